"""Rules on the shape of scales: along which axis, in which blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from exporters.tensorrt.lint.rules import finding, label
from exporters.tensorrt.lint.view import DEQUANTIZE, QUANTIZE, Operand, Product, View, attribute_axis, constant
from fp8pipe.artifact.finding import Finding

__all__ = ["lint_scales"]

_SMALL_INPUTS: Final = 64  # a weight of fewer inputs has no two blocks of 32
_EIGHT_BITS: Final = frozenset((ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN))


def lint_scales(view: View) -> Iterator[Finding]:
    """Findings on every quantizer's scale against what it scales, and against the product that reads it."""
    refused = set()
    for node in view.nodes(QUANTIZE, DEQUANTIZE):
        found = list(_shape(node))
        if found:
            refused.add(node)
        yield from found
    seen: set[ir.Node] = set()
    for product in view.products:
        for operand, other in (product.operands, product.operands[::-1]):
            reader = operand.dequantize
            if reader is not None and reader not in refused and reader not in seen:
                seen.add(reader)
                yield from _weight(product, operand, other) if operand.stored else _activation(product, operand)


def _shape(node: ir.Node) -> Iterator[Finding]:
    """Whether the scale can be laid on the codes at all."""
    value, scale = node.inputs[0], constant(node.inputs[1])
    if value is None or scale is None or scale.size == 1 or value.shape is None:
        return
    sides = tuple(side if isinstance(side, int) else None for side in value.shape)
    axis, block = attribute_axis(node, len(sides)), node.attributes.get_int("block_size", 0)
    if scale.ndim == 1 and not block:
        if axis >= len(sides) or sides[axis] not in (None, len(scale)):
            side = sides[axis] if axis < len(sides) else "no such axis"
            yield finding("scale-shape", node, f"{len(scale)} scales along axis {axis}, which has {side}")
        return
    fitting = scale.ndim == len(sides) and all(
        side in (None, count) for at, (side, count) in enumerate(zip(sides, scale.shape, strict=True)) if at != axis
    )
    if not fitting or not block:
        seen = f"blocks of {block}" if block else "no block_size"
        yield finding("scale-shape", node, f"scales {scale.shape} for {sides}, axis {axis}, {seen}")
        return
    side = sides[axis]
    if side is not None and -(-side // block) != scale.shape[axis]:
        why = f"block_size {block} and {scale.shape[axis]} scales for {side} numbers: the builder goes by the scales"
        yield finding("block-size" if side % scale.shape[axis] == 0 else "scale-shape", node, why)


def _weight(product: Product, operand: Operand, other: Operand) -> Iterator[Finding]:
    node, codes = operand.dequantize, operand.codes
    assert node is not None
    scale = constant(node.inputs[1])
    if codes is None or codes.shape is None or scale is None:
        return
    rank = len(codes.shape)
    summed = product.contracted(operand, rank)
    blocks = _blocks(node, scale, rank, summed)
    if blocks > 1 and other.low and other.quantizer is not None and other.quantizer.domain in ("", "ai.onnx"):
        why = f"{blocks} blocks of inputs beside a quantized activation: their scales end up behind the sum over them"
        yield finding("scaled-blocks", node, why)
    elif scale.ndim == 1 and scale.size > 1 and summed is not None and attribute_axis(node, rank) == summed:
        yield finding("weight-axis", node, f"one scale for each of {scale.size} inputs")
    elif blocks > 1 and codes.dtype in _EIGHT_BITS and not other.low:
        yield finding("eight-bit-blocks", node, f"{codes.dtype.name} in {blocks} blocks of inputs")
    elif codes.dtype == ir.DataType.INT4 and not other.low and summed is not None and blocks == 1:
        inputs = codes.shape[summed]
        if isinstance(inputs, int) and inputs >= _SMALL_INPUTS and not _blocked_elsewhere(node, scale, summed):
            yield finding("one-block", node, f"INT4 with one scale for all {inputs} inputs of a channel")


def _blocks(node: ir.Node, scale: Any, rank: int, summed: int | None) -> int:
    """How many scales an output channel has."""
    if scale.ndim != rank or summed is None or not node.attributes.get_int("block_size", 0):
        return 1
    return int(scale.shape[summed]) if attribute_axis(node, rank) == summed else 1


def _blocked_elsewhere(node: ir.Node, scale: Any, summed: int) -> bool:
    """Blocks along the outputs, which the builder multiplies from as well."""
    return bool(node.attributes.get_int("block_size", 0)) and attribute_axis(node, scale.ndim) != summed


def _activation(product: Product, operand: Operand) -> Iterator[Finding]:
    """One scale for each number that is summed over; along another axis the builder multiplies codes."""
    node = operand.dequantize
    assert node is not None
    scale = constant(node.inputs[1])
    rank = _rank(operand)
    if scale is None or scale.ndim != 1 or scale.size == 1 or rank is None:
        return
    if attribute_axis(node, rank) == product.contracted(operand, rank):
        why = f"one scale for each of {np.size(scale)} inputs of {label(product.node)}"
        yield finding("activation-axis", node, why)


def _rank(operand: Operand) -> int | None:
    """Of an activation's codes: as they, or what they were made from, are written down; else of a usual one."""
    quantizer = operand.quantizer
    for value in (operand.codes, operand.value, quantizer.inputs[0] if quantizer is not None else None):
        if value is not None and value.shape is not None:
            return len(value.shape)
    return None
