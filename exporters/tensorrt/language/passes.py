"""Passes over the graph of a language model, beside those of `exporters/graph`.

`quantize_inputs` inserts static quantizers (Q/DQ pairs with one scale per tensor) before linear layers, `type_scales`
converts scales to the base dtype, and `tie_head` stores a tied output head once. Layers that read the same value of the
graph (queries, keys and values; gate and up) share one Q/DQ pair, and the builder merges each such group into one
matrix multiplication.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import ml_dtypes
import numpy as np
import onnx_ir as ir

from exporters.graph.passes.editing import Change, drop_unused, insert, quantize_value
from exporters.graph.trace import FloatGraph, stored_array
from exporters.tensorrt.half import NotHalf
from fp8pipe.numerics.nvfp4 import BlockScales

__all__ = ["check_half_blocks", "drop_quantizers", "quantize_inputs", "tie_head", "type_scales"]

_FP8: Final = np.dtype(ml_dtypes.float8_e4m3fn)
_SMALLEST_CODE: Final = 0.5  # of E2M1; all others are multiples of it
_SCALE: Final = 1  # index of the scale among the inputs of QuantizeLinear and DequantizeLinear


def quantize_inputs(traced: FloatGraph, scales: Mapping[str, float]) -> Change:
    """Insert a `QuantizeLinear, DequantizeLinear` pair (E4M3) at the input of every linear layer.

    Layers that read the same value of the graph share one pair and must have the same scale.

    Args:
        traced: the graph; changed in place.
        scales: static activation scales by layer.

    Returns:
        The change, with the names of the inserted pairs.

    Raises:
        ValueError: two layers read the same value and have different scales.
    """
    pairs: dict[ir.Value, tuple[float, ir.Value]] = {}
    changed = []
    for product in traced.in_graph_order():
        value, scale = product.node.inputs[0], scales[product.name]
        assert value is not None
        if value not in pairs:
            site = f"{product.name}.input"
            pairs[value] = scale, quantize_value(traced.model.graph, product.node, value, site, scale, _FP8)
            changed.append(site)
        if pairs[value][0] != scale:
            raise ValueError(f"{product.name} shares its input with a layer that has another scale")
        product.node.replace_input_with(0, pairs[value][1])
    return Change("quantize_inputs", tuple(changed))


def drop_quantizers(model: ir.Model) -> Change:
    """Remove the quantizers of activations from the graph, in place, so that activations are not rounded to FP8."""
    changed = []
    for node in list(model.graph):
        quantize = node.inputs[0].producer() if node.op_type == "DequantizeLinear" and node.inputs[0] else None
        if quantize is not None and quantize.op_type == "QuantizeLinear" and quantize.inputs[0] is not None:
            node.outputs[0].replace_all_uses_with(quantize.inputs[0])
            changed.append(str(node.name))
    return Change("drop_quantizers", tuple(changed))


def type_scales(model: ir.Model, dtype: ir.DataType) -> Change:
    """Convert the stored scales of quantizers to `dtype`, in place, without changing their values.

    Raises:
        NotHalf: FP16 cannot represent a scale exactly.
    """
    changed = []
    for value in list(model.graph.initializers.values()):
        is_scale = any("quantize" in node.op_type.lower() and index == _SCALE for node, index in value.uses())
        if not is_scale or value.dtype == dtype or value.const_value is None:
            continue
        array = value.const_value.numpy()
        typed = array.astype(dtype.numpy())
        if not np.array_equal(typed.astype(np.float32), array):
            raise NotHalf(str(value.name), "a scale that FP16 cannot represent exactly")
        value.const_value = ir.tensor(typed, name=str(value.name))
        value.type = ir.TensorType(dtype)
        changed.append(str(value.name))
    for node in model.graph:
        output = node.outputs[0]
        if node.op_type == "DequantizeLinear" and output.dtype == ir.DataType.FLOAT:  # as for a float32 graph
            output.type = ir.TensorType(dtype)
    return Change("type_scales", tuple(changed))


def check_half_blocks(name: str, scales: BlockScales) -> None:
    """Check that FP16 represents every value of a weight in NVFP4 exactly.

    Values are multiples of half a block scale times the tensor scale, with few significant bits, so it is enough that
    these are exact.

    Raises:
        NotHalf: it does not; `name` is the weight.
    """
    step = _SMALLEST_CODE * scales.product
    if not bool((step.half().float() == step).all()):
        raise NotHalf(name, "block scales whose values FP16 cannot represent exactly")


def tie_head(model: ir.Model) -> Change:
    """Replace an output head that is the transpose of the embedding by a Transpose node, in place.

    The tracer evaluates the transposition of a tied head, so that the file would contain the embedding twice.
    """
    graph = model.graph
    embeddings = [n.inputs[0] for n in graph if n.op_type == "Gather" and n.inputs[0] is not None]
    tables = [v for v in embeddings if v.const_value is not None and v.shape is not None and len(v.shape) == 2]
    changed = []
    for node in list(graph):
        head = node.inputs[1] if node.op_type == "MatMul" else None
        if head is None or head.const_value is None or head.shape is None:
            continue
        table = next((table for table in tables if _transposes(table, head)), None)
        if table is not None:
            names = f"{table.name}/Transpose", f"{table.name}/transposed"
            transposed = insert(graph, node, "Transpose", [table], *names, head, attributes={"perm": [1, 0]})
            node.replace_input_with(1, transposed)
            drop_unused(graph, head)
            changed.append(str(node.name))
    return Change("tie_head", tuple(changed))


def _transposes(table: ir.Value, head: ir.Value) -> bool:
    ours, theirs = stored_array(table), stored_array(head).T
    return ours.shape == theirs.shape and ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
