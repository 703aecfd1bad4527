"""Pass: what is not quantized runs in float64, and meets the quantizers' fp32 in one cast on each side.

For a graph that was traced from a float64 model. Codes, scales and the products of codes stay as ONNX Runtime's
integer kernels want them: fp32 in, fp32 out. Each quantizer reads its value rounded to fp32 once, and each product of
codes is widened as soon as it is scaled. (Why this makes results equal bit for bit: `fp8pipe/models/vision/exact.py`.)
"""

from __future__ import annotations

import onnx_ir as ir

from exporters.graph.passes.editing import Change, cast, cast_outputs
from exporters.graph.trace import FloatGraph

__all__ = ["make_islands"]


def make_islands(traced: FloatGraph) -> Change:
    """Insert the casts into a quantized float64 graph, in place; the graph's input and output become fp32.

    The change names the values that are cast.
    """
    graph = traced.model.graph
    changed = [_narrow_input(graph, node) for node in list(graph) if node.op_type == "QuantizeLinear"]
    changed += [_widen(graph, product.node) for product in traced.products]
    return Change("make_islands", (*changed, *_narrow_ends(graph)))


def _narrow_input(graph: ir.Graph, quantize: ir.Node) -> str:
    """fp32 before a quantizer, and before the Clip that belongs to it."""
    first, value = quantize, quantize.inputs[0]
    assert value is not None
    producer = value.producer()
    if producer is not None and producer.op_type == "Clip" and str(producer.name).endswith("/Clip"):
        first, value = producer, producer.inputs[0]
    assert value is not None
    site = str(quantize.name).removesuffix("/QuantizeLinear")
    first.replace_input_with(0, cast(graph, first, value, ir.DataType.FLOAT, f"{site}/fp32/Cast", f"{site}/fp32"))
    return site


def _widen(graph: ir.Graph, product: ir.Node) -> str:
    """float64 behind a product of codes."""
    output = product.outputs[0]
    uses = [*output.uses()]
    output.type = ir.TensorType(ir.DataType.FLOAT)
    cast = ir.node("Cast", [output], {"to": int(ir.DataType.DOUBLE)}, name=f"{product.name}/Cast")
    wide = cast.outputs[0]
    wide.name, wide.type, wide.shape = f"{output.name}/double", ir.TensorType(ir.DataType.DOUBLE), output.shape
    graph.insert_after(product, cast)
    for node, index in uses:
        node.replace_input_with(index, wide)
    return str(output.name)


def _narrow_ends(graph: ir.Graph) -> list[str]:
    """fp32 pixels in, fp32 logits out, under their names."""
    for value in graph.inputs:
        value.type = ir.TensorType(ir.DataType.FLOAT)
        readers = [(node, index) for node, index in value.uses()]
        double = f"{value.name}/double"
        wide = cast(graph, readers[0][0], value, ir.DataType.DOUBLE, f"{double}/Cast", double)
        for node, index in readers:
            node.replace_input_with(index, wide)
    cast_outputs(graph, "double")
    return [str(value.name) for value in (*graph.inputs, *graph.outputs)]
