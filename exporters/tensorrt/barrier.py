"""Pass: queries are clipped to their range before they are quantized, also where quantizing would clip them anyway.

The builder moves a quantizer upwards, through transposes and slices, into the product that feeds it. The joint product
of queries, keys and values has three, of different scales; to apply them it multiplies them into the product's
weights, which it dequantizes for that. The result is an FP8 or INT8 model whose widest products run in half precision,
without a word. A Clip is not moved, so it keeps one of the three where it is, and with it the weights' codes.
Its bounds are the values of the smallest and largest code: it changes no code.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from exporters.graph.passes import Change
from exporters.graph.passes.tensors import add_initializer
from fp8pipe.numerics.grids import E4M3
from fp8pipe.numerics.quantizers import INT8_MAX, INT8_MIN

__all__ = ["hold_queries"]

_QUERIES = ".q/QuantizeLinear"


def hold_queries(model: ir.Model) -> Change:
    """Clip every quantized query that is not clipped yet; in place."""
    changed = []
    for node in list(model.graph):
        if node.op_type != "QuantizeLinear" or not (node.name or "").endswith(_QUERIES):
            continue
        value = node.inputs[0]
        assert value is not None
        producer = value.producer()
        if producer is None or producer.op_type != "Clip":
            changed.append(_clip(model.graph, node, value))
    return Change("hold_queries", tuple(changed))


def _clip(graph: ir.Graph, quantize: ir.Node, value: ir.Value) -> str:
    site = str(quantize.name).removesuffix("/QuantizeLinear")
    scale, zero = quantize.inputs[1], quantize.inputs[2]
    assert scale is not None
    assert scale.const_value is not None
    assert zero is not None
    low, high = (INT8_MIN, INT8_MAX) if zero.dtype == ir.DataType.INT8 else (-E4M3.max, E4M3.max)
    step = scale.const_value.numpy()
    bounds = [
        add_initializer(graph, f"{site}/{name}", (np.asarray(code, step.dtype) * step).astype(step.dtype))
        for name, code in (("low", low), ("high", high))
    ]
    node = ir.node("Clip", [value, *bounds], name=f"{site}/Clip")
    output = node.outputs[0]
    output.name, output.type, output.shape = f"{site}/clipped", value.type, value.shape
    graph.insert_before(quantize, node)
    quantize.replace_input_with(0, output)
    return site
