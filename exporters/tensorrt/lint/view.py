"""Identifies the quantizers and products (MatMul, Gemm, Conv) of any graph by structure, and all element types.

Names are not used, so graphs of any origin can be read. Between DequantizeLinear and a product the builder looks
through operators that only move numbers, change their float type or multiply all of them by one number. `Operand`
describes what is found.

Types are those that a strongly typed builder sees: there are no implicit conversions. Files from other sources often do
not declare types; where a type cannot be derived, it is not checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import onnx_ir as ir

QUANTIZE: Final = "QuantizeLinear"
DEQUANTIZE: Final = "DequantizeLinear"
PRODUCTS: Final = ("MatMul", "Gemm", "Conv")
# Types that the builder treats as codes, not as numbers.
CODES: Final = frozenset((ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1))
_MOVES: Final = ("Transpose", "Reshape", "Identity", "Cast", "Squeeze", "Unsqueeze", "Flatten", "Expand")
_ARITHMETIC: Final = (
    "Add", "Sub", "Mul", "Div", "Pow", "Relu", "LeakyRelu", "Gelu", "Erf", "Sigmoid", "Tanh", "Clip", "Sqrt", "Exp",
    "Abs", "Neg", "Min", "Max",
)  # fmt: skip


def constant(value: ir.Value | None) -> Any:
    """A constant as a numpy array: a stored tensor or Constant, also behind Identity and Cast; None if computed."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "Constant":
        stored = node.attributes.get("value")
        return stored.as_tensor().numpy() if stored is not None and stored.type == ir.AttributeType.TENSOR else None
    if node.op_type == "Identity":
        return constant(node.inputs[0])
    if node.op_type == "Cast":
        array = constant(node.inputs[0])
        return None if array is None else array.astype(ir.DataType(node.attributes.get_int("to", 1)).numpy())
    return None


def computed(node: ir.Node) -> list[ir.Value]:
    """Operands that are not constant."""
    return [value for value in node.inputs if value is not None and constant(value) is None]


def fixed(value: ir.Value | None) -> bool:
    """Whether a value is constant, or dequantized from constants, as the block scales of NVFP4 are."""
    node = value.producer() if value is not None else None
    dequantized = node is not None and node.op_type == DEQUANTIZE and all(fixed(operand) for operand in node.inputs)
    return dequantized or constant(value) is not None


def attribute_axis(node: ir.Node, rank: int) -> int:
    """The `axis` attribute of a quantizer as a non-negative index, for a tensor with `rank` axes."""
    axis = node.attributes.get_int("axis", 1)
    return axis + rank if axis < 0 else axis


@dataclass(frozen=True, slots=True)
class Operand:
    """One operand of a product."""

    value: ir.Value  # the operand itself
    position: int  # 0 or 1
    dequantize: ir.Node | None  # the DequantizeLinear that the operand comes from; None for a float operand
    # operators after it that the builder does not look through; if there are any, it multiplies floats
    between: tuple[ir.Node, ...] = ()
    moves: tuple[ir.Node, ...] = ()  # operators after it that the builder looks through

    @property
    def codes(self) -> ir.Value | None:
        """The tensor that is dequantized."""
        return self.dequantize.inputs[0] if self.dequantize is not None else None

    @property
    def quantizer(self) -> ir.Node | None:
        """The QuantizeLinear (or one from another domain) that computes the codes; None for a stored weight."""
        node = self.codes.producer() if self.codes is not None else None
        return node if node is not None and constant(node.inputs[0]) is None else None

    @property
    def stored(self) -> bool:
        """Whether it is a quantized weight, including one that the builder has to quantize."""
        return self.dequantize is not None and self.quantizer is None

    @property
    def low(self) -> bool:
        """Whether the builder recognizes this operand as codes."""
        return self.dequantize is not None and not self.between


@dataclass(frozen=True, slots=True)
class Product:
    """A MatMul, Gemm or Conv with its two operands."""

    node: ir.Node
    operands: tuple[Operand, Operand]

    @property
    def low(self) -> bool:
        """Whether the builder recognizes both operands as codes."""
        return all(operand.low for operand in self.operands)

    def contracted(self, operand: Operand, rank: int) -> int | None:
        """The axis of an operand's codes that is summed over; None if a reshaping operator hides it."""
        if self.node.op_type == "Conv":
            axis = 1
        elif self.node.op_type == "Gemm":
            flipped = bool(self.node.attributes.get_int("transB" if operand.position else "transA", 0))
            axis = int(flipped) if operand.position else 1 - int(flipped)
        else:
            axis = rank - 2 if operand.position and rank > 1 else rank - 1
        for move in operand.moves:  # from the product towards the codes
            if move.op_type == "Transpose":
                order = move.attributes.get_ints("perm", tuple(range(rank))[::-1])
                axis = order[axis]
            elif move.op_type not in ("Identity", "Cast", "Mul", "Div"):
                return None
        return axis


@dataclass(frozen=True)
class View:
    """A model and its products, analysed once."""

    model: ir.Model  # never modified

    def nodes(self, *ops: str) -> Iterator[ir.Node]:
        """Nodes of the main graph with these operator types in ONNX's own domain."""
        return (node for node in self.model.graph if node.op_type in ops and node.domain in ("", "ai.onnx"))

    @cached_property
    def products(self) -> tuple[Product, ...]:
        """All products, in the graph's order."""
        found = []
        for node in self.nodes(*PRODUCTS):
            first, second = node.inputs[:2]
            if first is not None and second is not None:
                found.append(Product(node, (_operand(first, 0), _operand(second, 1))))
        return tuple(found)


def _operand(value: ir.Value, position: int) -> Operand:
    # Follow an operand upwards to its DequantizeLinear, and sort the operators in between.
    moves: list[ir.Node] = []
    between: list[ir.Node] = []
    current: ir.Value | None = value
    while current is not None:
        node = current.producer()
        if node is None or node.domain not in ("", "ai.onnx"):
            break
        if node.op_type == DEQUANTIZE:
            return Operand(value, position, node, tuple(between), tuple(moves))
        source = _through(node)
        if source is None:
            break
        (moves if _looked_through(node) else between).append(node)
        current = source
    return Operand(value, position, None)


def _through(node: ir.Node) -> ir.Value | None:
    """The single computed operand of an elementwise operator or of one that only moves numbers; else None."""
    if node.op_type in _MOVES:
        return node.inputs[0]
    if node.op_type not in _ARITHMETIC:
        return None
    values = computed(node)
    return values[0] if len(values) == 1 else None


def _looked_through(node: ir.Node) -> bool:
    if node.op_type in _MOVES:
        return True
    arrays = [constant(value) for value in node.inputs] if node.op_type in ("Mul", "Div") else []
    return any(array is not None and np.size(array) == 1 for array in arrays)


_LIKE_FIRST: Final = frozenset((
    "Abs", "Add", "Clip", "Concat", "Conv", "Div", "Dropout", "Erf", "Exp", "Expand", "Flatten", "Gather", "Gelu",
    "Gemm", "Identity", "LayerNormalization", "MatMul", "Max", "Min", "Mul", "Neg", "Pad", "Pow", "RMSNormalization",
    "ReduceMax", "ReduceMean", "ReduceSum", "Relu", "Reshape", "Sigmoid", "Slice", "Softmax", "Split", "Sqrt",
    "Squeeze", "Sub", "Tanh", "Tile", "Transpose", "Unsqueeze",
))  # fmt: skip


def code_type(quantize: ir.Node) -> ir.DataType:
    """The output type of QuantizeLinear: its zero point's, its attribute's, or ONNX's default, UINT8."""
    zero = quantize.inputs[2] if len(quantize.inputs) > 2 else None
    if zero is not None and zero.dtype is not None:
        return zero.dtype
    return ir.DataType(quantize.attributes.get_int("output_dtype", 0) or ir.DataType.UINT8)


def element_types(graph: ir.Graph) -> dict[ir.Value, ir.DataType]:
    """The element types of all values of the main graph whose type is declared or can be derived."""
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
    """The output type that the operator's definition gives; None if it cannot be derived."""
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
