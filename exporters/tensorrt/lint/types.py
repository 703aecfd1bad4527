"""The element type of every value, as a strongly typed builder sees it: nothing is converted on the way.

Files from elsewhere often do not say. What is not known here is not judged.
"""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from exporters.tensorrt.lint.view import DEQUANTIZE, QUANTIZE

__all__ = ["code_type", "element_types"]

_LIKE_FIRST: Final = frozenset((
    "Abs", "Add", "Clip", "Concat", "Conv", "Div", "Dropout", "Erf", "Exp", "Expand", "Flatten", "Gather", "Gelu",
    "Gemm", "Identity", "LayerNormalization", "MatMul", "Max", "Min", "Mul", "Neg", "Pad", "Pow", "RMSNormalization",
    "ReduceMax", "ReduceMean", "ReduceSum", "Relu", "Reshape", "Sigmoid", "Slice", "Softmax", "Split", "Sqrt",
    "Squeeze", "Sub", "Tanh", "Tile", "Transpose", "Unsqueeze",
))  # fmt: skip


def code_type(quantize: ir.Node) -> ir.DataType:
    """The type that QuantizeLinear gives: its zero point's, its attribute's, or ONNX's default, UINT8."""
    zero = quantize.inputs[2] if len(quantize.inputs) > 2 else None
    if zero is not None and zero.dtype is not None:
        return zero.dtype
    return ir.DataType(quantize.attributes.get_int("output_dtype", 0) or ir.DataType.UINT8)


def element_types(graph: ir.Graph) -> dict[ir.Value, ir.DataType]:
    """Types of the values of the main graph, those that are known."""
    known: dict[ir.Value, ir.DataType] = {}
    for value in (*graph.inputs, *graph.initializers.values()):
        if value.dtype is not None:
            known[value] = value.dtype
    for node in graph:
        found = _given(node, known)
        for output in node.outputs:
            dtype = found if found is not None else output.dtype
            if dtype is not None:
                known[output] = dtype
    return known


def _given(node: ir.Node, known: dict[ir.Value, ir.DataType]) -> ir.DataType | None:
    """The type that an operator's definition gives its outputs."""
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "Cast":
        return ir.DataType(node.attributes.get_int("to", 0))
    if node.op_type == QUANTIZE:
        return code_type(node)
    if node.op_type == DEQUANTIZE:
        given = node.attributes.get_int("output_dtype", 0)
        return ir.DataType(given) if given else _type(node, 1, known)
    if node.op_type == "Constant" and "value" in node.attributes:
        return node.attributes["value"].as_tensor().dtype
    if node.op_type == "Where":
        return _type(node, 1, known)
    return _type(node, 0, known) if node.op_type in _LIKE_FIRST else None


def _type(node: ir.Node, position: int, known: dict[ir.Value, ir.DataType]) -> ir.DataType | None:
    value = node.inputs[position] if position < len(node.inputs) else None
    return None if value is None else known.get(value)
