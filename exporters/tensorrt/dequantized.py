"""A graph without its quantizers: the same weights in floating point, activations not rounded; speed is against it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from exporters.graph.passes.editing import cast

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["dequantize_graph"]


def dequantize_graph(model: ir.Model) -> int:
    """Replace stored codes by values in their scale's type, and drop quantizers of activations; in place.

    Returns how many DequantizeLinear nodes are gone.
    """
    graph, gone = model.graph, 0
    for node in [node for node in graph if node.op_type == "DequantizeLinear"]:
        codes, output = node.inputs[0], node.outputs[0]
        assert codes is not None
        producer = codes.producer()
        if codes.const_value is not None:
            value = _stored(graph, node)
        elif producer is not None and producer.op_type == "QuantizeLinear" and producer.inputs[0] is not None:
            value = _typed(graph, node, _unclipped(producer.inputs[0]))
        else:
            continue
        output.replace_all_uses_with(value)
        graph.remove(node, safe=True)
        gone += 1
    for kind in ("QuantizeLinear", "Clip"):
        for node in [node for node in graph if node.op_type == kind and not node.outputs[0].uses()]:
            graph.remove(node, safe=True)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        graph.initializers.pop(name)
    return gone


def _stored(graph: ir.Graph, node: ir.Node) -> ir.Value:
    arrays = [value.const_value.numpy() for value in node.inputs[:2] if value is not None and value.const_value]
    codes, scale = arrays
    axis, block = node.attributes.get_int("axis", 1), node.attributes.get_int("block_size", 0)
    array = (codes.astype(np.float32) * _spread(scale, codes, axis, block)).astype(scale.dtype)
    name = f"{node.name}/value"
    value = ir.Value(name=name, const_value=ir.tensor(array, name=name), shape=ir.Shape(array.shape))
    value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
    graph.initializers[name] = value
    return value


def _spread(scale: NDArray[Any], codes: NDArray[Any], axis: int, block: int) -> NDArray[Any]:
    """One scale per tensor, per channel or per block, in a shape that multiplies the codes."""
    if block:
        return np.repeat(scale, block, axis=axis).astype(np.float32)
    if scale.size == 1:
        return scale.astype(np.float32)
    sides = [1] * codes.ndim
    sides[axis] = scale.size
    return scale.astype(np.float32).reshape(sides)


def _unclipped(value: ir.Value) -> ir.Value:
    """A Clip that a quantizer alone reads is its range: a part of it."""
    producer = value.producer()
    if producer is None or producer.op_type != "Clip" or len(value.uses()) > 1 or producer.inputs[0] is None:
        return value
    return producer.inputs[0]


def _typed(graph: ir.Graph, node: ir.Node, value: ir.Value) -> ir.Value:
    """The activation before its quantizer, in the type that the dequantized one has: pixels are float32."""
    wanted = node.inputs[1].dtype if node.inputs[1] is not None else None
    if wanted is None or value.dtype == wanted:
        return value
    return cast(graph, node, value, wanted, f"{node.name}/Cast", f"{node.name}/cast")
