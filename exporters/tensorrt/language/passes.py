"""Passes on a decoder's graph: static quantizers before linears, scales in the base type, a tied head.

Q/DQ pairs hold per-tensor scales. Queries, keys and values read one value of the graph, and so do gate and up: they
share one pair, and the builder makes one product of each group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import ml_dtypes
import numpy as np
import onnx_ir as ir

from exporters.graph.passes import Change
from exporters.graph.passes.editing import drop_unused, insert, quantize_value
from exporters.graph.trace import FloatGraph
from exporters.tensorrt.half import NotHalf

__all__ = ["drop_quantizers", "quantize_inputs", "tie_head", "type_scales"]

_FP8: Final = np.dtype(ml_dtypes.float8_e4m3fn)
_SCALE: Final = 1  # position among a quantizer's operands


def quantize_inputs(traced: FloatGraph, scales: Mapping[str, float]) -> Change:
    """Insert `QuantizeLinear, DequantizeLinear` (E4M3) before every product's activation; one pair per value.

    Args:
        traced: changed in place.
        scales: by layer; layers that read one value have one scale.

    Returns:
        The names of the pairs.

    Raises:
        ValueError: two layers read one value and have different scales.
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
            raise ValueError(f"{product.name} shares its input with a layer of another scale")
        product.node.replace_input_with(0, pairs[value][1])
    return Change("quantize_inputs", tuple(changed))


def drop_quantizers(model: ir.Model) -> Change:
    """Activations pass their quantizers unrounded: the same graph, without what makes it chaotic; in place."""
    changed = []
    for node in list(model.graph):
        quantize = node.inputs[0].producer() if node.op_type == "DequantizeLinear" and node.inputs[0] else None
        if quantize is not None and quantize.op_type == "QuantizeLinear" and quantize.inputs[0] is not None:
            node.outputs[0].replace_all_uses_with(quantize.inputs[0])
            changed.append(str(node.name))
    return Change("drop_quantizers", tuple(changed))


def type_scales(model: ir.Model, dtype: ir.DataType) -> Change:
    """Scales take the type of what they dequantize to; their values do not change.

    Raises:
        NotHalf: FP16 does not hold one exactly.
    """
    changed = []
    for value in list(model.graph.initializers.values()):
        is_scale = any("quantize" in node.op_type.lower() and index == _SCALE for node, index in value.uses())
        if not is_scale or value.dtype == dtype or value.const_value is None:
            continue
        array = value.const_value.numpy()
        typed = array.astype(dtype.numpy())
        if not np.array_equal(typed.astype(np.float32), array):
            raise NotHalf(str(value.name), "a scale that FP16 does not hold exactly")
        value.const_value = ir.tensor(typed, name=str(value.name))
        value.type = ir.TensorType(dtype)
        changed.append(str(value.name))
    return Change("type_scales", tuple(changed))


def tie_head(model: ir.Model) -> Change:
    """A stored matrix that is another one transposed becomes a Transpose of it: a tied head is stored once.

    The tracer folds the transposition, so that the embedding would lie in the file twice.
    """
    graph = model.graph
    embeddings = [n.inputs[0] for n in graph if n.op_type == "Gather" and n.inputs[0] is not None]
    tables = [v for v in embeddings if v.const_value is not None and v.shape is not None and len(v.shape) == 2]
    changed = []
    for node in list(graph):
        head = node.inputs[1] if node.op_type == "MatMul" else None
        if head is None or head.const_value is None or head.shape is None:
            continue
        for table in tables:
            if _transposes(table, head):
                names = f"{table.name}/Transpose", f"{table.name}/transposed"
                transposed = insert(graph, node, "Transpose", [table], *names, head, attributes={"perm": [1, 0]})
                node.replace_input_with(1, transposed)
                drop_unused(graph, head)
                changed.append(str(node.name))
                break
    return Change("tie_head", tuple(changed))


def _transposes(table: ir.Value, head: ir.Value) -> bool:
    assert table.const_value is not None
    assert head.const_value is not None
    if tuple(reversed(table.const_value.shape)) != tuple(head.const_value.shape) or table.dtype != head.dtype:
        return False
    return np.array_equal(table.const_value.numpy(), head.const_value.numpy().T)
