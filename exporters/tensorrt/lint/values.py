"""Rules on single tensors, and on versions.

Zero points, element types, and numbers that engines do not refuse but compute with; what a GPU's generation lacks, and
what an opset does not define.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import onnx_ir as ir

from exporters.tensorrt.lint.rules import finding, label
from exporters.tensorrt.lint.view import CODES, DEQUANTIZE, QUANTIZE, View, code_type, constant
from fp8pipe.artifact.finding import Finding

__all__ = ["lint_machines", "lint_values"]

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
    if len(node.inputs) < 3:
        return
    if node.inputs[2] is None:
        yield finding("empty-zero-point", node, "the operand is there and has no name")
        return
    zero = constant(node.inputs[2])
    if zero is not None and np.any(zero.astype(np.float32)):
        shown = np.unique(zero.astype(np.float32))
        yield finding("zero-point", node, f"zero point {', '.join(f'{number:g}' for number in shown[:4])}")


def _unsigned(node: ir.Node) -> Iterator[Finding]:
    if node.op_type == QUANTIZE:
        dtype = code_type(node)
        if dtype in _UNSIGNED:
            stated = len(node.inputs) > 2 or "output_dtype" in node.attributes
            why = f"gives {dtype.name}" if stated else f"states no type, and ONNX's default is {dtype.name}"
            yield finding("unsigned", node, f"{why}; the builder takes INT8 for it, which ends at 127")
        return
    codes = node.inputs[0]
    if codes is not None and codes.const_value is not None and codes.dtype in _UNSIGNED:
        yield finding("unsigned-weight", node, f"dequantizes stored {codes.dtype.name}")


def _scale(scale: ir.Value, node: ir.Node) -> Iterator[Finding]:
    array = constant(scale)
    if array is None:
        return
    numbers = array.astype(np.float32)
    bad = int((~(numbers > 0)).sum())  # NaN is not above zero
    if bad:
        yield finding("scale-value", node, f"{bad} of {numbers.size} scales are zero, negative or NaN")
    if np.isposinf(numbers).any():
        yield finding("scale-infinite", node, f"{int(np.isposinf(numbers).sum())} scales are infinite, and outputs NaN")


def _stored(value: ir.Value) -> Iterator[Finding]:
    if value.dtype in _REFUSED_TYPES:
        yield finding("element-type", value, f"is stored as {value.dtype.name}")
    if value.dtype == ir.DataType.FLOAT8E4M3FN and value.const_value is not None:
        nan = int((value.const_value.numpy().view(np.uint8) & 0x7F == 0x7F).sum())  # E4M3 has two NaN, of either sign
        if nan:
            yield finding("nan-code", value, f"{nan} codes are NaN, and with them every output of their channels")
    if value.dtype in CODES:
        for node, position in value.uses():
            quantizer = node.op_type in (QUANTIZE, DEQUANTIZE)
            if not quantizer and node.domain in ("", "ai.onnx"):
                yield finding("codes-undecoded", value, f"{node.op_type} reads stored {value.dtype.name} codes")
            elif quantizer and position == 0 and node.op_type == QUANTIZE:
                yield finding("codes-undecoded", value, "QuantizeLinear reads stored codes")


def _casts(view: View) -> Iterator[Finding]:
    for node in view.nodes("Cast"):
        to = ir.DataType(node.attributes.get_int("to", 0))
        if to in _FP8 and constant(node.inputs[0]) is None:
            yield finding("cast-fp8", node, f"rounds to {to.name}")
        elif to == ir.DataType.INT8 and constant(node.inputs[0]) is None:
            readers = [reader for reader, _ in node.outputs[0].uses()]
            back = [r.attributes.get_int("to", 0) in _FLOATS for r in readers if r.op_type == "Cast"]
            if readers and len(back) == len(readers) and all(back):
                yield finding("cast-int8", node, "rounds to INT8 and back")


# Rule, type, and the first compute capability that has it.
_FIRST: Final = (
    ("fp8-capability", ir.DataType.FLOAT8E4M3FN, (8, 9)),
    ("fp4-capability", ir.DataType.FLOAT4E2M1, (12, 0)),
    ("int4-capability", ir.DataType.INT4, (8, 0)),
)
# The opset that lets QuantizeLinear and DequantizeLinear have a type; 21 brings blocks and scales of every float type.
_OPSETS: Final = {
    ir.DataType.FLOAT8E4M3FN: 19, ir.DataType.FLOAT8E5M2: 19, ir.DataType.INT4: 21, ir.DataType.UINT4: 21,
    ir.DataType.FLOAT4E2M1: 23,
}  # fmt: skip


def lint_machines(view: View, capabilities: Sequence[str]) -> Iterator[Finding]:
    """Findings on types against compute capabilities ("8.9") and against the graph's opset."""
    held = _types(view)
    for rule, dtype, first in _FIRST:
        where = held.get(dtype)
        older = [text for text in capabilities if _version(text) < first]
        if where is not None and older:
            yield finding(rule, where, f"{dtype.name}, which {', '.join(older)} does not have")
    opset = view.model.opset_imports.get("", view.model.opset_imports.get("ai.onnx", 0))
    needed = max((_OPSETS.get(dtype, 0) for dtype in held), default=0)
    if any(node.attributes.get_int("block_size", 0) for node in view.nodes(QUANTIZE, DEQUANTIZE)):
        needed = max(needed, 21)
    if held and opset < needed:
        yield finding("opset", "the model", f"opset {opset}; its quantizers are defined from {needed} on")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _types(view: View) -> dict[ir.DataType, str]:
    """Types of codes, each with one tensor or node that has it."""
    held: dict[ir.DataType, str] = {}
    for value in view.model.graph.initializers.values():
        if value.dtype is not None and value.dtype in _OPSETS:
            held.setdefault(value.dtype, label(value))
    for node in view.nodes(QUANTIZE):
        held.setdefault(code_type(node), label(node))
    return held
