"""Rules on versions: what a GPU's generation lacks, and what an opset does not define."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import onnx_ir as ir

from exporters.tensorrt.lint.rules import finding, label
from exporters.tensorrt.lint.types import code_type
from exporters.tensorrt.lint.view import DEQUANTIZE, QUANTIZE, View
from fp8pipe.artifact.finding import Finding

__all__ = ["lint_machines"]

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
