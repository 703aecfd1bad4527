"""Small good Q/DQ graphs with names of nobody's, for tests that break them in one place each.

Every graph has a fixed shape, so that a build needs no profile. Codes are random and scales are made up: what is
tested is what a builder does with a form.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx_ir as ir

__all__ = ["TOKENS", "WIDTH", "SmallGraph", "attention", "chain", "convolution", "gemm", "mlp", "nvfp4"]

TOKENS: Final = 64
WIDTH: Final = 128
_HEADS: Final = 2
_BLOCK: Final = 32
_DTYPES: Final[dict[str, Any]] = {
    "int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn, "int4": ml_dtypes.int4, "fp4": ml_dtypes.float4_e2m1fn,
}  # fmt: skip
_LARGEST: Final = {"int8": 127.0, "fp8": 448.0, "int4": 7.0, "fp4": 6.0}


class SmallGraph:
    """Writes a graph node by node.

    Args:
        base: numpy's type of what is not quantized.
        opset: of the graph.
    """

    def __init__(self, base: Any = np.float16, opset: int = 21) -> None:
        self.base = base
        self._random = np.random.default_rng(0)
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": opset}, name="small")

    def input(self, name: str, shape: tuple[int, ...]) -> ir.Value:
        """An input of the base type."""
        dtype = ir.DataType.from_numpy(np.dtype(self.base))
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def stored(self, name: str, array: Any) -> ir.Value:
        """An initialiser."""
        tensor = ir.tensor(np.asarray(array), name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def node(self, op: str, inputs: list[ir.Value | None], name: str, **attributes: Any) -> ir.Value:
        """A node of one output, which is called after it."""
        made = ir.node(op, inputs, attributes, name=name)
        made.outputs[0].name = f"{name}_out"
        self.graph.append(made)
        return made.outputs[0]

    def codes(self, form: str, shape: tuple[int, ...]) -> Any:
        """Random ones, over the whole range."""
        most = _LARGEST[form]
        if form in ("fp8", "fp4"):
            return self._random.uniform(-most, most, shape).astype(_DTYPES[form])
        return self._random.integers(-int(most), int(most) + 1, shape).astype(_DTYPES[form])

    def quantized(self, value: ir.Value, form: str, name: str, scale: float = 0.02) -> ir.Value:
        """`NAME_q`, `NAME_dq` with the stored `NAME_s`, `NAME_z`."""
        dtype = _DTYPES[form]
        operands = [self.stored(f"{name}_s", np.array(scale, self.base)), self.stored(f"{name}_z", np.zeros((), dtype))]
        codes = self.node("QuantizeLinear", [value, *operands], f"{name}_q")
        return self.node("DequantizeLinear", [codes, *operands], f"{name}_dq")

    def weight(self, form: str, shape: tuple[int, ...], name: str, axis: int = 1) -> ir.Value:
        """`NAME_dq` of the stored `NAME` and `NAME_s`, one scale a place of `axis`; INT4 one a block of 32 rows."""
        scales, how = (shape[axis],), {"axis": axis}
        if form == "int4":
            scales, how = (shape[0] // _BLOCK, shape[1]), {"axis": 0, "block_size": _BLOCK}
        scale = self._random.uniform(0.5, 1.0, scales) / _LARGEST[form] / 8
        operands = [self.stored(name, self.codes(form, shape)), self.stored(f"{name}_s", scale.astype(self.base))]
        return self.node("DequantizeLinear", operands, f"{name}_dq", **how)

    def linear(self, value: ir.Value, form: str, rows: int, columns: int, name: str) -> ir.Value:
        """Product `NAME` with `NAME_w`, then `NAME_add` of one number a channel."""
        product = self.node("MatMul", [value, self.weight(form, (rows, columns), f"{name}_w")], name)
        bias = self._random.normal(size=columns).astype(self.base)
        return self.node("Add", [product, self.stored(f"{name}_b", bias)], f"{name}_add")

    def reshape(self, value: ir.Value, shape: tuple[int, ...], name: str) -> ir.Value:
        """In one node."""
        return self.node("Reshape", [value, self.stored(f"{name}_shape", np.array(shape, np.int64))], name)

    def done(self, *outputs: ir.Value) -> ir.Model:
        """The model."""
        self.graph.outputs.extend(outputs)
        for value in outputs:
            value.type = ir.TensorType(ir.DataType.from_numpy(np.dtype(self.base)))
        return ir.Model(self.graph, ir_version=10, producer_name="small_graphs")


def mlp(weights: str, activations: str | None, base: Any = np.float16, hidden: int = 2 * WIDTH) -> ir.Model:
    """Products `up` (128 to hidden) and `down` (hidden to 128), a Relu between; quantizers `up_x`, `down_x`.

    Args:
        weights: int8, fp8 or int4.
        activations: int8 or fp8; None leaves them float.
        base: type of what is not quantized.
        hidden: channels between.
    """
    g = SmallGraph(base)
    value = g.input("x", (TOKENS, WIDTH))
    for name, rows, columns in (("up", WIDTH, hidden), ("down", hidden, WIDTH)):
        value = g.quantized(value, activations, f"{name}_x") if activations else value
        value = g.linear(value, weights, rows, columns, name)
        value = g.node("Relu", [value], "relu") if name == "up" else value
    return g.done(value)


def chain(form: str, base: Any, tokens: int, blocks: Sequence[tuple[int, str, str]]) -> ir.Model:
    """Products `p0`, `p1`, ... one behind another.

    Args:
        form: int8 or fp8, of weights and activations.
        base: type of what is not quantized.
        tokens: rows.
        blocks: outputs of each, MatMul or Gemm (with its weight transposed), and what follows it; empty for nothing.
    """
    g = SmallGraph(base)
    rows = WIDTH
    value = g.input("x", (tokens, rows))
    for index, (columns, op, after) in enumerate(blocks):
        name = f"p{index}"
        value = g.quantized(value, form, f"{name}_x")
        if op == "Gemm":
            weight = g.weight(form, (columns, rows), f"{name}_w", axis=0)
            bias = g.stored(f"{name}_b", np.ones(columns, base))
            value = g.node("Gemm", [value, weight, bias], name, transB=1)
        else:
            value = g.linear(value, form, rows, columns, name)
        value = g.node(after, [value], f"{name}_after") if after else value
        rows = columns
    return g.done(value)


def gemm(form: str) -> ir.Model:
    """Product `up`, a Gemm with its weight transposed: (out, in)."""
    g = SmallGraph()
    value = g.quantized(g.input("x", (TOKENS, WIDTH)), form, "up_x")
    weight = g.weight(form, (2 * WIDTH, WIDTH), "up_w", axis=0)
    return g.done(g.node("Gemm", [value, weight, g.stored("up_b", np.ones(2 * WIDTH, np.float16))], "up", transB=1))


def convolution(form: str, side: int) -> ir.Model:
    """Product `up`, a Conv over patches of side x side that do not overlap."""
    g = SmallGraph()
    value = g.quantized(g.input("x", (1, 16, 4 * side, 4 * side)), form, "up_x")
    weight = g.weight(form, (64, 16, side, side), "up_w", axis=0)
    return g.done(g.node("Conv", [value, weight], "up", kernel_shape=[side, side], strides=[side, side]))


def attention(form: str, *, joint: bool = True, held: bool = True) -> ir.Model:
    """Self-attention: products `qkv` (or `q`, `k`, `v`), `qk`, `av`, `proj`; quantizers `x`, `q_x`, ..., `probs`.

    Args:
        form: int8 or fp8.
        joint: whether one product gives queries, keys and values.
        held: whether queries are clipped before they are quantized, which holds their quantizer back.
    """
    g = SmallGraph()
    low = g.quantized(g.input("x", (1, TOKENS, WIDTH)), form, "x")
    q, k, v = _joint(g, low, form) if joint else [_head(g, g.linear(low, form, WIDTH, WIDTH, n), n) for n in "qkv"]
    q = g.node("Mul", [q, g.stored("factor", np.array(0.125, np.float16))], "times")
    if held:
        most = _LARGEST[form] * 0.01
        q = g.node("Clip", [q, *(g.stored(f"q_{n}", np.array(n * most, np.float16)) for n in (-1, 1))], "q_clip")
    q = g.quantized(q, form, "q_x", 0.01)
    k = g.quantized(g.node("Transpose", [k], "k_t", perm=[0, 1, 3, 2]), form, "k_x", 0.03)
    v = g.quantized(v, form, "v_x", 0.04)
    probs = g.node("Softmax", [g.node("MatMul", [q, k], "qk")], "softmax", axis=-1)
    mixed = g.node("MatMul", [g.quantized(probs, form, "probs", 1 / _LARGEST[form]), v], "av")
    mixed = g.reshape(g.node("Transpose", [mixed], "back", perm=[0, 2, 1, 3]), (1, TOKENS, WIDTH), "flatten")
    return g.done(g.linear(g.quantized(mixed, form, "proj_x"), form, WIDTH, WIDTH, "proj"))


def _joint(g: SmallGraph, value: ir.Value, form: str) -> list[ir.Value]:
    """Three of (1, heads, tokens, width / heads) from one product."""
    value = g.linear(value, form, WIDTH, 3 * WIDTH, "qkv")
    value = g.reshape(value, (1, TOKENS, 3, _HEADS, WIDTH // _HEADS), "heads")
    value = g.node("Transpose", [value], "heads_t", perm=[2, 0, 3, 1, 4])
    return [
        g.node("Gather", [value, g.stored(f"at_{name}", np.array(index, np.int64))], f"{name}_part", axis=0)
        for index, name in enumerate("qkv")
    ]


def _head(g: SmallGraph, value: ir.Value, name: str) -> ir.Value:
    value = g.reshape(value, (1, TOKENS, _HEADS, WIDTH // _HEADS), f"{name}_heads")
    return g.node("Transpose", [value], f"{name}_part", perm=[0, 2, 1, 3])


def nvfp4(*, opset: int = 23) -> ir.Model:
    """Product `up` of E2M1 by E2M1 in blocks of 16, with E4M3 scales of the blocks and one scale above them."""
    g = SmallGraph(opset=opset)
    g.graph.opset_imports["trt"] = 1
    x = g.input("x", (TOKENS, WIDTH))
    above = g.stored("x_above", np.array(0.002, np.float16))
    dynamic = ir.node(
        "TRT_FP4DynamicQuantize", [x, above], {"axis": -1, "block_size": 16, "scale_type": 17}, domain="trt",
        num_outputs=2, name="x_q",
    )  # fmt: skip
    for output, name in zip(dynamic.outputs, ("x_codes", "x_blocks"), strict=True):
        output.name = name
    g.graph.append(dynamic)
    blocks = g.node("DequantizeLinear", [dynamic.outputs[1], above], "x_blocks_dq")
    low = g.node("DequantizeLinear", [dynamic.outputs[0], blocks], "x_dq", axis=-1, block_size=16)
    scales = abs(g.codes("fp8", (WIDTH // 16, 2 * WIDTH)).astype(np.float32)).clip(1).astype(_DTYPES["fp8"])
    stored = [g.stored("up_w_blocks", scales), g.stored("up_w_above", np.array(0.001, np.float16))]
    operands = [g.stored("up_w", g.codes("fp4", (WIDTH, 2 * WIDTH))), g.node("DequantizeLinear", stored, "up_w_s_dq")]
    weight = g.node("DequantizeLinear", operands, "up_w_dq", axis=0, block_size=16)
    return g.done(g.node("MatMul", [low, weight], "up"))
