"""Rules on matrix multiplications and convolutions: operand types, and what the builder fuses or moves.

The builder makes one kernel of an attention if both of its matrix multiplications use codes and only a quantizer lies
between its softmax and the second one. It also moves quantizers upwards into the matrix multiplication whose result
they quantize (see `hold_queries` in `exporters.tensorrt.graph`); if it moves several quantizers of parts of one result
(queries, keys, values) there, it dequantizes that multiplication's weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import onnx_ir as ir

from exporters.tensorrt.lint.rules import finding, label
from exporters.tensorrt.lint.view import (
    DEQUANTIZE,
    QUANTIZE,
    Operand,
    Product,
    View,
    code_type,
    computed,
    constant,
    element_types,
    fixed,
)
from fp8pipe.artifact.finding import Finding

_ABOVE: Final = ("Add", "Sub", "Mul", "Div", "Where", "Cast", "Clip", "Reshape", "Identity", "Squeeze", "Unsqueeze")
_BELOW: Final = (QUANTIZE, DEQUANTIZE, "Clip", "Cast", "Reshape", "Identity", "Dropout", "Mul")
_PARTS: Final = ("Split", "Slice", "Gather")
_MOVABLE: Final = (
    *_PARTS, "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Cast", "Add", "Mul", "Div",
)  # fmt: skip


def lint_attention(view: View) -> Iterator[Finding]:
    """Findings on attention, on joint matrix multiplications, and on values that are quantized more than once."""
    products = {product.node: product for product in view.products}
    static = all(isinstance(side, int) for value in view.model.graph.inputs for side in value.shape or (None,))
    for softmax in view.nodes("Softmax"):
        first = _up(softmax.inputs[0], products)
        second = _down(softmax.outputs[0], products)
        if first is not None and second is not None and first is not second:
            yield from _attention(softmax, first, second, static)
    for product in view.products:
        yield from _moved(product)
    yield from _several(view)


def _up(value: ir.Value | None, products: dict[ir.Node, Product]) -> Product | None:
    """The matrix multiplication of two activations that produces a softmax's logits."""
    waiting, seen = [value], set()
    while waiting:
        node = current.producer() if (current := waiting.pop()) is not None else None
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in products and not any(o.stored or constant(o.value) is not None for o in products[node].operands):
            return products[node]
        if node.op_type in _ABOVE:
            waiting += node.inputs
    return None


def _down(value: ir.Value, products: dict[ir.Node, Product]) -> Product | None:
    """The matrix multiplication that reads a softmax's probabilities; None if none is found."""
    waiting, seen = [value], set()
    while waiting:
        for node, _ in waiting.pop().uses():
            if node in products:
                return products[node]
            if node.op_type in _BELOW and node not in seen:
                seen.add(node)
                waiting += node.outputs
    return None


def _attention(softmax: ir.Node, first: Product, second: Product, static: bool) -> Iterator[Finding]:
    # Find attentions that are not fused: one matrix multiplication has codes and the other has not, or a Clip lies
    # between Softmax and QuantizeLinear.
    if first.low != second.low:
        why = f"{label(first.node)} multiplies {_shown(first)}, {label(second.node)} {_shown(second)}: not fused"
        yield finding("attention-part", softmax, why)
    if not (first.low and second.low):
        return
    for node, _ in softmax.outputs[0].uses():
        quantize = next((n for n, _ in node.outputs[0].uses() if n.op_type == QUANTIZE), None)
        if node.op_type == "Clip" and quantize is not None:
            why = "Clip between Softmax and QuantizeLinear: the attention is not fused"
            gives_up = static and code_type(quantize) == ir.DataType.INT8
            yield finding("clipped-fixed-probabilities" if gives_up else "clipped-probabilities", node, why)


def _shown(product: Product) -> str:
    return "codes" if product.low else "floats"


def _moved(product: Product) -> Iterator[Finding]:
    found = moved_quantizers(product)
    if len(found) > 1:
        shown = ", ".join(label(node) for node in found)
        yield finding("moved-quantizers", product.node, f"the builder moves {len(found)} quantizers into it: {shown}")


def moved_quantizers(product: Product) -> tuple[ir.Node, ...]:
    """Quantizers of parts of a product's result that the builder moves into it; empty if one of them cannot be moved.

    A part is cut out by Split, Slice or Gather, such as the queries of a joint multiplication.
    """
    if not product.low or not product.operands[1].stored:
        return ()
    found: dict[ir.Node, None] = {}
    waiting: list[tuple[ir.Value, bool]] = [(product.node.outputs[0], False)]
    while waiting:
        value, part = waiting.pop()
        uses = value.uses()
        if not uses or value.is_graph_output():
            return ()
        for node, _ in uses:
            if node.op_type == QUANTIZE:
                found.update({node: None} if part else {})  # moving a quantizer of the whole result does no harm
            elif node.op_type in _MOVABLE and len(computed(node)) == 1:
                waiting += [(output, part or node.op_type in _PARTS) for output in node.outputs]
            else:
                return ()  # this operator keeps its quantizer in place; then the builder moves none of them
    return tuple(found)


def _several(view: View) -> Iterator[Finding]:
    """Findings on values that several linears read through quantizers with different scales."""
    readers: dict[ir.Value, dict[bytes, ir.Node]] = {}
    for product in view.products:
        for operand, other in (product.operands, product.operands[::-1]):
            quantize = operand.quantizer
            if operand.low and other.stored and quantize is not None and quantize.op_type == QUANTIZE:
                scale = constant(quantize.inputs[1])
                source = quantize.inputs[0]
                if scale is not None and source is not None:
                    readers.setdefault(source, {}).setdefault(scale.tobytes(), quantize)
    for value, quantizers in readers.items():
        if len(quantizers) > 1:
            shown = ", ".join(label(node) for node in quantizers.values())
            yield finding(
                "several-quantizers", value, f"{shown}: the matrix multiplications that read it are not fused"
            )


_LARGEST_FILTER: Final = 32  # number of kernel positions; there is no FP8 convolution kernel for more
_BINARY: Final = ("Add", "Sub", "Mul", "Div")
_FLOATS: Final = frozenset((ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16))


def lint_operands(view: View) -> Iterator[Finding]:
    """Findings on operands: of matrix multiplications, convolutions and quantizers, and mixed float types.

    Mixed float types are also looked for in Add, Sub, Mul and Div.
    """
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
    """The type of an operand's codes; None for a float operand."""
    return types.get(operand.codes) if operand.low and operand.codes is not None else None


def _codes(product: Product, types: dict[ir.Value, ir.DataType]) -> Iterator[Finding]:
    # Find operands with codes of different types, and FP8 convolutions whose kernel is too large.
    first, second = (_type(operand, types) for operand in product.operands)
    if first is None or second is None:
        return
    if first != second:
        pair = {first, second}
        if not pair & {ir.DataType.UINT8, ir.DataType.UINT4}:  # those have their own findings
            rule = "int4-beside-int8" if pair == {ir.DataType.INT4, ir.DataType.INT8} else "mixed-codes"
            yield finding(rule, product.node, f"{first.name} and {second.name}")
    weight = product.operands[1].codes
    if product.node.op_type == "Conv" and first == second == ir.DataType.FLOAT8E4M3FN and weight is not None:
        places = math.prod(side for side in list(weight.shape or ())[2:] if isinstance(side, int))
        if places > _LARGEST_FILTER:
            why = f"a filter of {places} positions; the builder has FP8 kernels for at most {_LARGEST_FILTER}"
            yield finding("fp8-convolution", product.node, why)


def _between(product: Product) -> Iterator[Finding]:
    for operand, other in (product.operands, product.operands[::-1]):
        if operand.between and operand.dequantize is not None and other.dequantize is not None:
            shown = ", ".join(str(node.op_type) for node in operand.between)
            yield finding(
                "between", product.node, f"{shown} between {label(operand.dequantize)} and the matrix multiplication"
            )


def _half(product: Product, types: dict[ir.Value, ir.DataType], whole: set[ir.DataType | None]) -> Iterator[Finding]:
    # Find products of codes with a float operand, unless that is the usual form of a weight-only graph.
    for operand, other in (product.operands, product.operands[::-1]):
        if not operand.low or operand.dequantize is None or other.dequantize is not None or not _plain(operand):
            continue
        codes = _type(operand, types)
        if not operand.stored:
            why = f"{label(operand.dequantize)} dequantizes codes, but {other.value.name} is float"
            yield finding("half-quantized", product.node, why)
        elif codes in whole and constant(other.value) is None:
            shown = codes.name if codes is not None else ""
            why = f"its weight is {shown}, its activation float; in other layers of this graph both are {shown}"
            yield finding("half-quantized", product.node, why)


def _plain(operand: Operand) -> bool:
    """Whether an operand is quantized by ONNX's own operators; those of other domains follow rules not known here."""
    node = operand.codes.producer() if operand.codes is not None else None
    return node is None or node.domain in ("", "ai.onnx")


def _quantizers(view: View) -> Iterator[Finding]:
    """Findings on quantizers of stored weights, with a scale computed at run time, or of activations to INT4."""
    readers = {operand.quantizer: product for product in view.products for operand in product.operands if operand.low}
    for node in view.nodes(QUANTIZE):
        if constant(node.inputs[0]) is not None:
            yield finding("float-weight", node, "quantizes a stored float tensor, so the builder computes the codes")
            continue
        if not fixed(node.inputs[1]) and node in readers:
            yield finding("dynamic-scale", node, "its scale is computed while the engine runs")
        if code_type(node) == ir.DataType.INT4 and node in readers:
            yield finding("int4-activation", node, "quantizes activations to INT4, for which no kernel is known")
