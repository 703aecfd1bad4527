"""Rules on what the builder fuses or moves: attention as one kernel, and the products before its quantizers.

An attention is one kernel when both of its products multiply codes and nothing but quantizing stands between its
softmax and the second product. Quantizers move upwards into the product that feeds them (see `hold_queries` in
`exporters.tensorrt.graph`); several that quantize parts of one product (queries, keys, values) cost it its codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import onnx_ir as ir

from exporters.tensorrt.lint.rules import finding, label
from exporters.tensorrt.lint.view import DEQUANTIZE, QUANTIZE, Product, View, code_type, constant
from fp8pipe.artifact.finding import Finding

__all__ = ["lint_attention"]

_ABOVE: Final = ("Add", "Sub", "Mul", "Div", "Where", "Cast", "Clip", "Reshape", "Identity", "Squeeze", "Unsqueeze")
_BELOW: Final = (QUANTIZE, DEQUANTIZE, "Clip", "Cast", "Reshape", "Identity", "Dropout", "Mul")
_PARTS: Final = ("Split", "Slice", "Gather")
_MOVABLE: Final = (
    *_PARTS, "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Cast", "Add", "Mul", "Div",
)  # fmt: skip


def lint_attention(view: View) -> Iterator[Finding]:
    """Findings on attentions, joint products and values that are quantized more than once."""
    products = {product.node: product for product in view.products}
    fixed = all(isinstance(side, int) for value in view.model.graph.inputs for side in value.shape or (None,))
    for softmax in view.nodes("Softmax"):
        first = _up(softmax.inputs[0], products)
        second = _down(softmax.outputs[0], products)
        if first is not None and second is not None and first is not second:
            yield from _attention(softmax, first, second, fixed)
    for product in view.products:
        yield from _moved(product)
    yield from _several(view)


def _up(value: ir.Value | None, products: dict[ir.Node, Product]) -> Product | None:
    """The product of two activations that a softmax's logits come from."""
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
    """The product that reads the probabilities."""
    waiting, seen = [value], set()
    while waiting:
        for node, _ in waiting.pop().uses():
            if node in products:
                return products[node]
            if node.op_type in _BELOW and node not in seen:
                seen.add(node)
                waiting += node.outputs
    return None


def _attention(softmax: ir.Node, first: Product, second: Product, fixed: bool) -> Iterator[Finding]:
    if first.low != second.low:
        why = f"{label(first.node)} multiplies {_shown(first)}, {label(second.node)} {_shown(second)}: not one kernel"
        yield finding("attention-part", softmax, why)
    if not (first.low and second.low):
        return
    for node, _ in softmax.outputs[0].uses():
        quantize = next((n for n, _ in node.outputs[0].uses() if n.op_type == QUANTIZE), None)
        if node.op_type == "Clip" and quantize is not None:
            why = "Clip between Softmax and QuantizeLinear: the attention is not fused"
            gives_up = fixed and code_type(quantize) == ir.DataType.INT8
            yield finding("clipped-fixed-probabilities" if gives_up else "clipped-probabilities", node, why)


def _shown(product: Product) -> str:
    return "codes" if product.low else "floats"


def _moved(product: Product) -> Iterator[Finding]:
    """Several quantizers of a product's parts: all move into it."""
    if not product.low or not product.operands[1].stored:
        return
    found: dict[ir.Node, None] = {}
    waiting: list[tuple[ir.Value, bool]] = [(product.node.outputs[0], False)]
    while waiting:
        value, part = waiting.pop()
        uses = value.uses()
        if not uses or value.is_graph_output():
            return
        for node, _ in uses:
            if node.op_type == QUANTIZE:
                found.update({node: None} if part else {})  # quantizers of all of its numbers cost nothing
            elif node.op_type in _MOVABLE and _one_computed(node):
                waiting += [(output, part or node.op_type in _PARTS) for output in node.outputs]
            else:
                return  # something on the way holds its quantizer back, and with it the others
    if len(found) > 1:
        shown = ", ".join(label(node) for node in found)
        yield finding("moved-quantizers", product.node, f"{len(found)} quantizers move into it: {shown}")


def _one_computed(node: ir.Node) -> bool:
    return sum(value is not None and constant(value) is None for value in node.inputs) == 1


def _several(view: View) -> Iterator[Finding]:
    """One value read through quantizers of different scales by products with weights."""
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
            yield finding("several-quantizers", value, f"{shown}: products that read it are not joined into one")
