"""Rules on a product's two sides together: of which types they are, and whether both are codes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import onnx_ir as ir

from exporters.tensorrt.lint.rules import finding, label
from exporters.tensorrt.lint.view import QUANTIZE, Operand, Product, View, code_type, constant, element_types, fixed
from fp8pipe.artifact.finding import Finding

__all__ = ["lint_operands"]

_LARGEST_FILTER: Final = 32  # places of a filter; with more there is no FP8 kernel
_BINARY: Final = ("Add", "Sub", "Mul", "Div")
_FLOATS: Final = frozenset((ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16))


def lint_operands(view: View) -> Iterator[Finding]:
    """Findings on every product, and on every sum of two float types."""
    types = element_types(view.model.graph)
    whole = {_type(product.operands[0], types) for product in view.products if product.low}
    for product in view.products:
        yield from _codes(product, types)
        yield from _between(product)
        yield from _half(product, types, whole)
    for node in (*(product.node for product in view.products), *view.nodes(*_BINARY)):
        pair = [types.get(value) for value in node.inputs[:2] if value is not None]
        if len(pair) == 2 and all(dtype in _FLOATS for dtype in pair) and pair[0] != pair[1]:
            yield finding("operand-types", node, f"{pair[0].name} and {pair[1].name}")  # type: ignore[union-attr]
    yield from _quantizers(view)


def _type(operand: Operand, types: dict[ir.Value, ir.DataType]) -> ir.DataType | None:
    """Of its codes."""
    return types.get(operand.codes) if operand.low and operand.codes is not None else None


def _codes(product: Product, types: dict[ir.Value, ir.DataType]) -> Iterator[Finding]:
    first, second = (_type(operand, types) for operand in product.operands)
    if first is None or second is None:
        return
    if first != second:
        pair = {first, second}
        quiet = pair == {ir.DataType.INT4, ir.DataType.INT8}
        unknown = pair & {ir.DataType.UINT8, ir.DataType.UINT4}  # has findings of its own
        if not unknown:
            rule = "int4-beside-int8" if quiet else "mixed-codes"
            yield finding(rule, product.node, f"{first.name} and {second.name}")
    weight = product.operands[1].codes
    if product.node.op_type == "Conv" and first == second == ir.DataType.FLOAT8E4M3FN and weight is not None:
        places = 1
        for side in list(weight.shape or ())[2:]:
            places *= side if isinstance(side, int) else 1
        if places > _LARGEST_FILTER:
            why = f"a filter of {places} places; the builder has FP8 kernels for at most {_LARGEST_FILTER}"
            yield finding("fp8-convolution", product.node, why)


def _between(product: Product) -> Iterator[Finding]:
    for operand, other in (product.operands, product.operands[::-1]):
        if operand.between and other.dequantize is not None:
            shown = ", ".join(str(node.op_type) for node in operand.between)
            dequantize = operand.dequantize
            assert dequantize is not None
            yield finding("between", product.node, f"{shown} between {label(dequantize)} and the product")


def _half(product: Product, types: dict[ir.Value, ir.DataType], whole: set[ir.DataType | None]) -> Iterator[Finding]:
    for operand, other in (product.operands, product.operands[::-1]):
        if not operand.low or other.dequantize is not None or not _plain(operand):
            continue
        codes = _type(operand, types)
        assert operand.dequantize is not None
        if not operand.stored:
            why = f"{label(operand.dequantize)} gives codes, {other.value.name} is float"
            yield finding("half-quantized", product.node, why)
        elif codes in whole and constant(other.value) is None:
            shown = codes.name if codes is not None else ""
            why = f"its weight is {shown}, its activation float; other products of this graph are {shown} on both sides"
            yield finding("half-quantized", product.node, why)


def _plain(operand: Operand) -> bool:
    """Quantized by ONNX's own operators; those of a builder's domain have rules that are not known here."""
    node = operand.codes.producer() if operand.codes is not None else None
    return node is None or node.domain in ("", "ai.onnx")


def _quantizers(view: View) -> Iterator[Finding]:
    """Quantizers whose scale is computed, of stored numbers, or of 4 bits."""
    readers = {operand.quantizer: product for product in view.products for operand in product.operands if operand.low}
    for node in view.nodes(QUANTIZE):
        if constant(node.inputs[0]) is not None:
            yield finding("float-weight", node, "quantizes a stored float tensor: the builder rounds it, not you")
            continue
        if not fixed(node.inputs[1]) and node in readers:
            yield finding("dynamic-scale", node, "its scale is computed while the engine runs")
        if code_type(node) == ir.DataType.INT4 and node in readers:
            yield finding("int4-activation", node, "gives INT4, which no kernel is known to multiply")
