"""What breaks a good graph, and what the real builder then has to show.

Edits change a graph in place. A check of type `Seen` says what is missing in what was built; it is empty when the
builder shows what it should.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Final

import ml_dtypes
import numpy as np
import onnx_ir as ir
from graph_edits import Edit, before, behind, both, drop, find, replace, set_attributes, store, stored

from exporters.tensorrt.builder import Built
from exporters.tensorrt.listing import read_precision

E4M3: Final = ml_dtypes.float8_e4m3fn
Seen = Callable[[ir.Model, Built], str]


def products(model: ir.Model, built: Built) -> dict[str, str]:
    """The precision of every product by its node; a star where its attention is fused."""
    nodes = [str(node.name) for node in model.graph if node.op_type in ("MatMul", "Gemm", "Conv")]
    report = read_precision(nodes, built.layers)
    return {found.node: found.name + "*" * found.fused_attention for found in report.products}


def runs_in(**expected: str) -> Seen:
    """These products are built in these precisions."""

    def seen(model: ir.Model, built: Built) -> str:
        found = products(model, built)
        return "" if expected.items() <= found.items() else f"{found}"

    return seen


def constant(shape: Sequence[int], dtype: str, kind: str = "", output: str = "") -> Seen:
    """A layer of that kind reads a stored tensor of that shape and type, and writes that type."""

    def seen(model: ir.Model, built: Built) -> str:
        for layer in built.layers:
            stored_here = any(port.shape == tuple(shape) and port.dtype == dtype for port in layer.constants)
            if stored_here and kind in layer.kind and output in {"", *(port.dtype for port in layer.outputs)}:
                return ""
        return f"no {kind} layer reads {dtype} {shape}"

    return seen


def warned(pattern: str) -> Seen:
    """The builder's warnings."""

    def seen(model: ir.Model, built: Built) -> str:
        return "" if any(re.search(pattern, text) for text in built.warnings) else f"{built.warnings}"

    return seen


def launches(kind: str, count: int) -> Seen:
    """So many layers of that kind."""

    def seen(model: ir.Model, built: Built) -> str:
        found = sum(layer.kind == kind for layer in built.layers)
        return "" if found == count else f"{found} {kind}"

    return seen


def all_of(*checks: Seen) -> Seen:
    """Every one."""
    return lambda model, built: "; ".join(filter(None, (check(model, built) for check in checks)))


def small(shape: tuple[int, ...]) -> Callable[[Any], Any]:
    """New scales of that shape, and of the type they had."""
    random = np.random.default_rng(1).uniform(0.001, 0.002, shape)
    return lambda array: random.astype(array.dtype)


def like(count: int) -> Callable[[Any], Any]:
    """One number repeated."""
    return lambda array: np.full(count, array)


def number(value: float) -> Callable[[Any], Any]:
    return lambda array: np.full_like(array, value)


def float_weight(model: ir.Model) -> None:
    """The codes' values in FP16, and a QuantizeLinear."""
    dequantize = find(model, "up_w_dq")
    codes, scale = (value.const_value.numpy() for value in dequantize.inputs[:2])
    values = stored(model, "up_w_float", (codes.astype(np.float32) * scale).astype(np.float16))
    zero = stored(model, "up_w_z", np.zeros(scale.shape, codes.dtype))
    made = ir.node("QuantizeLinear", [values, dequantize.inputs[1], zero], {"axis": 1}, name="up_w_q")
    made.outputs[0].name = "up_w_q_out"
    model.graph.insert_before(dequantize, made)
    dequantize.replace_input_with(0, made.outputs[0])


def instead(model: ir.Model, old: ir.Node, chain: Sequence[tuple[str, list[ir.Value], dict[str, Any]]]) -> None:
    """Nodes one after another for a node; each reads the one before, and what it is given."""
    value, *_ = old.inputs
    for index, (op, others, attributes) in enumerate(chain):
        made = ir.node(op, [value, *others], attributes, name=f"chain_{index}")
        value = made.outputs[0]
        value.name = f"chain_{index}_out"
        model.graph.insert_before(old, made)
    old.outputs[0].replace_all_uses_with(value)
    model.graph.remove(old, safe=True)


def cast_multiply(model: ir.Model) -> None:
    """Stored codes, Cast and Mul, as some exporters write weights."""
    dequantize = find(model, "up_w_dq")
    instead(model, dequantize, [("Cast", [], {"to": 10}), ("Mul", [dequantize.inputs[1]], {})])


def cast_activation(to: int) -> Edit:
    """Div, Cast, Cast, Mul for a quantizer."""

    def edit(model: ir.Model) -> None:
        drop("up_x_dq")(model)
        quantize = find(model, "up_x_q")
        scale = quantize.inputs[1]
        instead(
            model, quantize,
            [("Div", [scale], {}), ("Cast", [], {"to": to}), ("Cast", [], {"to": 10}), ("Mul", [scale], {})],
        )  # fmt: skip

    return edit


def transposed_codes(model: ir.Model) -> None:
    store("up_w", np.transpose)(model)
    before("up_w_dq", 0, "Transpose", perm=[1, 0])(model)


def transposed_weight(model: ir.Model) -> None:
    both(store("up_w", np.transpose), set_attributes("up_w_dq", axis=0))(model)
    behind("up_w_dq", "Transpose", perm=[1, 0])(model)


def dynamic(model: ir.Model) -> None:
    """The largest absolute value over 127, computed."""
    quantize, dequantize = find(model, "up_x_q"), find(model, "up_x_dq")
    value = quantize.inputs[0]
    chain: list[tuple[str, list[ir.Value], dict[str, Any]]] = [
        ("Abs", [], {}), ("ReduceMax", [], {"keepdims": 0}), ("Mul", [stored(model, "part", np.float16(1 / 127))], {})
    ]  # fmt: skip
    for op, others, attributes in chain:
        made = ir.node(op, [value, *others], attributes, name=f"dynamic_{op}")
        value = made.outputs[0]
        value.name = f"dynamic_{op}_out"
        model.graph.insert_before(quantize, made)
    quantize.replace_input_with(1, value)
    dequantize.replace_input_with(1, value)


def float_operand(model: ir.Model) -> None:
    """A float weight beside a quantized activation."""
    replace("up", 1, np.ones((128, 256), np.float16))(model)
    model.graph.remove(find(model, "up_w_dq"), safe=True)


def second_quantizer(model: ir.Model) -> None:
    """Keys from another quantizer of the same value."""
    quantize, reader = find(model, "x_q"), find(model, "k")
    scale = stored(model, "other_s", np.array(0.03, np.float16))
    value, zero = quantize.inputs[0], quantize.inputs[2]
    first = ir.node("QuantizeLinear", [value, scale, zero], name="other_q")
    second = ir.node("DequantizeLinear", [first.outputs[0], scale, zero], name="other_dq")
    first.outputs[0].name, second.outputs[0].name = "other_q_out", "other_dq_out"
    model.graph.insert_before(reader, [first, second])
    reader.replace_input_with(0, second.outputs[0])


def weights_of(form: str, shape: tuple[int, ...]) -> Callable[[Any], Any]:
    """The same codes in another type."""
    types = {"fp8": E4M3, "int8": np.int8, "int4": ml_dtypes.int4}
    return lambda array: np.clip(array.astype(np.float32), -7, 7).astype(types[form]).reshape(shape)


def nan(array: Any) -> Any:
    changed = array.copy()
    changed[3, 5] = np.nan
    return changed


def no_zero_points(model: ir.Model) -> None:
    for name in ("up_x_q", "up_x_dq"):
        find(model, name).resize_inputs(2)


def empty_zero_point(model: ir.Model) -> None:
    find(model, "up_w_dq").resize_inputs(3)
