"""Rules on single tensors and quantizers, and on the versions of GPUs and opsets.

They cover zero points, element types, values that engines accept but compute wrong results with, the axes and blocks
of scales, types that a GPU does not support, and types that the graph's opset does not define.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from exporters.tensorrt.lint.rules import finding, label
from exporters.tensorrt.lint.view import (
    CODES,
    DEQUANTIZE,
    QUANTIZE,
    Operand,
    Product,
    View,
    attribute_axis,
    code_type,
    constant,
)
from fp8pipe.artifact.finding import Finding

_REFUSED_TYPES: Final = frozenset((
    ir.DataType.FLOAT8E5M2, ir.DataType.FLOAT8E5M2FNUZ, ir.DataType.FLOAT8E4M3FNUZ, ir.DataType.UINT4,
))  # fmt: skip
_UNSIGNED: Final = frozenset((ir.DataType.UINT8, ir.DataType.UINT16))
_FP8: Final = frozenset((ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2))
_FLOATS: Final = frozenset((ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16))


def lint_values(view: View) -> Iterator[Finding]:
    """Findings on every quantizer's operands and every stored tensor."""
    scales: dict[ir.Value, ir.Node] = {}
    for node in view.nodes(QUANTIZE, DEQUANTIZE):
        yield from _zero_point(node)
        yield from _unsigned(node)
        if node.inputs[1] is not None:
            scales.setdefault(node.inputs[1], node)
    for scale, node in scales.items():
        yield from _scale(scale, node)
    for value in view.model.graph.initializers.values():
        yield from _stored(value)
    yield from _casts(view)


def _zero_point(node: ir.Node) -> Iterator[Finding]:
    # Find zero points other than 0, and those that are given but empty.
    if len(node.inputs) < 3:
        return
    if node.inputs[2] is None:
        yield finding("empty-zero-point", node, "the zero point is given, but its name is empty")
        return
    zero = constant(node.inputs[2])
    if zero is not None and np.any(zero.astype(np.float32)):
        shown = np.unique(zero.astype(np.float32))
        yield finding("zero-point", node, f"zero point {', '.join(f'{number:g}' for number in shown[:4])}")


def _unsigned(node: ir.Node) -> Iterator[Finding]:
    # Find quantizers and stored weights of an unsigned type.
    if node.op_type == QUANTIZE:
        dtype = code_type(node)
        if dtype in _UNSIGNED:
            stated = len(node.inputs) > 2 or "output_dtype" in node.attributes
            why = f"gives {dtype.name}" if stated else f"states no type, and ONNX's default is {dtype.name}"
            yield finding("unsigned", node, f"{why}; the builder uses INT8 instead, whose largest value is 127")
        return
    codes = node.inputs[0]
    if codes is not None and codes.const_value is not None and codes.dtype in _UNSIGNED:
        yield finding("unsigned-weight", node, f"dequantizes stored {codes.dtype.name}")


def _scale(scale: ir.Value, node: ir.Node) -> Iterator[Finding]:
    # Find scales that are not positive and finite.
    array = constant(scale)
    if array is None:
        return
    numbers = array.astype(np.float32)
    bad = int((~(numbers > 0)).sum())  # NaN is not greater than zero
    if bad:
        yield finding("scale-value", node, f"{bad} of {numbers.size} scales are zero, negative or NaN")
    if np.isposinf(numbers).any():
        yield finding(
            "scale-infinite", node, f"{int(np.isposinf(numbers).sum())} scales are infinite, so outputs are NaN"
        )


def _stored(value: ir.Value) -> Iterator[Finding]:
    # Find stored tensors of an unsupported type, NaN codes, and codes that anything but DequantizeLinear reads.
    if value.dtype in _REFUSED_TYPES:
        yield finding("element-type", value, f"is stored as {value.dtype.name}")
    if value.dtype == ir.DataType.FLOAT8E4M3FN and value.const_value is not None:
        nan = int((value.const_value.numpy().view(np.uint8) & 0x7F == 0x7F).sum())  # E4M3 has a NaN of either sign
        if nan:
            yield finding("nan-code", value, f"{nan} codes are NaN, and so is every output of their channels")
    if value.dtype in CODES:
        for node, position in value.uses():
            quantizer = node.op_type in (QUANTIZE, DEQUANTIZE)
            if not quantizer and node.domain in ("", "ai.onnx"):
                yield finding("codes-undecoded", value, f"{node.op_type} reads stored {value.dtype.name} codes")
            elif quantizer and position == 0 and node.op_type == QUANTIZE:
                yield finding("codes-undecoded", value, "QuantizeLinear reads stored codes")


def _casts(view: View) -> Iterator[Finding]:
    # Find quantization that is written with Cast instead of QuantizeLinear.
    for node in view.nodes("Cast"):
        to = ir.DataType(node.attributes.get_int("to", 0))
        if to in _FP8 and constant(node.inputs[0]) is None:
            yield finding("cast-fp8", node, f"rounds to {to.name}")
        elif to == ir.DataType.INT8 and constant(node.inputs[0]) is None:
            readers = [reader for reader, _ in node.outputs[0].uses()]
            back = [r.attributes.get_int("to", 0) in _FLOATS for r in readers if r.op_type == "Cast"]
            if readers and len(back) == len(readers) and all(back):
                yield finding("cast-int8", node, "rounds to INT8 and back")


# Rule, type, and the first compute capability that supports it.
_FIRST: Final = (
    ("fp8-capability", ir.DataType.FLOAT8E4M3FN, (8, 9)),
    ("fp4-capability", ir.DataType.FLOAT4E2M1, (12, 0)),
    ("int4-capability", ir.DataType.INT4, (8, 0)),
)
# The opset in which QuantizeLinear and DequantizeLinear accept a type; 21 adds blocks and scales of every float type.
_OPSETS: Final = {
    ir.DataType.FLOAT8E4M3FN: 19, ir.DataType.FLOAT8E5M2: 19, ir.DataType.INT4: 21, ir.DataType.UINT4: 21,
    ir.DataType.FLOAT4E2M1: 23,
}  # fmt: skip


def lint_machines(view: View, capabilities: Sequence[str]) -> Iterator[Finding]:
    """Findings on types that a compute capability ("8.9") or the graph's opset does not support."""
    held = _types(view)
    for rule, dtype, first in _FIRST:
        where = held.get(dtype)
        older = [text for text in capabilities if tuple(map(int, text.split("."))) < first]
        if where is not None and older:
            yield finding(rule, where, f"{dtype.name}, which compute capability {', '.join(older)} does not support")
    opset = view.model.opset_imports.get("", view.model.opset_imports.get("ai.onnx", 0))
    needed = max((_OPSETS.get(dtype, 0) for dtype in held), default=0)
    if any(node.attributes.get_int("block_size", 0) for node in view.nodes(QUANTIZE, DEQUANTIZE)):
        needed = max(needed, 21)
    if held and opset < needed:
        yield finding("opset", "the model", f"opset {opset}; its quantizers need opset {needed} or later")


def _types(view: View) -> dict[ir.DataType, str]:
    """The types of codes in a graph, each with the name of one tensor or node that has it."""
    held: dict[ir.DataType, str] = {}
    for value in view.model.graph.initializers.values():
        if value.dtype is not None and value.dtype in _OPSETS:
            held.setdefault(value.dtype, label(value))
    for node in view.nodes(QUANTIZE):
        held.setdefault(code_type(node), label(node))
    return held


_SMALL_INPUTS: Final = 64  # a weight with fewer inputs cannot have two blocks of 32
_EIGHT_BITS: Final = frozenset((ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN))


def lint_scales(view: View) -> Iterator[Finding]:
    """Findings on the shape, axis and blocks of every quantizer's scale, given the tensor and its consumer."""
    seen: set[ir.Node] = set()  # quantizers that have a finding or were checked already
    for node in view.nodes(QUANTIZE, DEQUANTIZE):
        for found in _shape(node):
            seen.add(node)
            yield found
    for product in view.products:
        for operand, other in (product.operands, product.operands[::-1]):
            reader = operand.dequantize
            if reader is not None and reader not in seen:
                seen.add(reader)
                yield from _weight(product, operand, other) if operand.stored else _activation(product, operand)


def _shape(node: ir.Node) -> Iterator[Finding]:
    """Find scales that cannot be broadcast to the codes."""
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
        why = f"block_size {block} and {scale.shape[axis]} scales for {side} values: the builder ignores block_size"
        yield finding("block-size" if side % scale.shape[axis] == 0 else "scale-shape", node, why)


def _weight(product: Product, operand: Operand, other: Operand) -> Iterator[Finding]:
    # Find weights whose scales or blocks lie along the wrong axis or do not suit the activation.
    node, codes = operand.dequantize, operand.codes
    scale = None if node is None else constant(node.inputs[1])
    if node is None or codes is None or codes.shape is None or scale is None:
        return
    rank = len(codes.shape)
    summed = product.contracted(operand, rank)
    blocks = _blocks(node, scale, rank, summed)
    if blocks > 1 and other.low and other.quantizer is not None and other.quantizer.domain in ("", "ai.onnx"):
        why = f"{blocks} blocks of inputs with a quantized activation: scales are applied after the sum over blocks"
        yield finding("scaled-blocks", node, why)
    elif scale.ndim == 1 and scale.size > 1 and summed is not None and attribute_axis(node, rank) == summed:
        yield finding("weight-axis", node, f"one scale for each of {scale.size} inputs")
    elif blocks > 1 and codes.dtype in _EIGHT_BITS and not other.low:
        yield finding("eight-bit-blocks", node, f"{codes.dtype.name} in {blocks} blocks of inputs")
    elif codes.dtype == ir.DataType.INT4 and not other.low and summed is not None and blocks == 1:
        inputs = codes.shape[summed]
        # The builder handles blocks along the outputs as well.
        elsewhere = node.attributes.get_int("block_size", 0) and attribute_axis(node, scale.ndim) != summed
        if isinstance(inputs, int) and inputs >= _SMALL_INPUTS and not elsewhere:
            yield finding("one-block", node, f"INT4 with one scale for all {inputs} inputs of a channel")


def _blocks(node: ir.Node, scale: Any, rank: int, summed: int | None) -> int:
    """Number of blocks, each with its own scale, along the inputs of an output channel."""
    if scale.ndim != rank or summed is None or not node.attributes.get_int("block_size", 0):
        return 1
    return int(scale.shape[summed]) if attribute_axis(node, rank) == summed else 1


def _activation(product: Product, operand: Operand) -> Iterator[Finding]:
    """Find activations with one scale per input channel, the summed axis; scales along other axes do no harm."""
    node, rank = operand.dequantize, _rank(operand)
    scale = None if node is None else constant(node.inputs[1])
    if node is None or scale is None or scale.ndim != 1 or scale.size == 1 or rank is None:
        return
    if attribute_axis(node, rank) == product.contracted(operand, rank):
        why = f"one scale for each of {np.size(scale)} inputs of {label(product.node)}"
        yield finding("activation-axis", node, why)


def _rank(operand: Operand) -> int | None:
    """Number of axes of an activation's codes, from their own shape or their source's; None if unknown."""
    quantizer = operand.quantizer
    for value in (operand.codes, operand.value, quantizer.inputs[0] if quantizer is not None else None):
        if value is not None and value.shape is not None:
            return len(value.shape)
    return None
