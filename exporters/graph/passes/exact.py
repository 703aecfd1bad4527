"""Passes of the exact format: float64 around integer matrix multiplications, and GELU in float64 for ONNX Runtime.

`make_islands` is for a graph that was traced from a float64 model. What is not quantized runs in float64, with a single
cast to or from fp32 on each side of the quantized parts. Codes, scales and the multiplications of codes stay as ONNX
Runtime's integer kernels need them: fp32 in, fp32 out. Each quantizer reads its value rounded once to fp32, and each
result of a multiplication of codes is converted to float64 right after scaling. (Why this makes results equal bit for
bit: `fp8pipe/models/vision/exact.py`.)

`expand_gelus` builds GELU from operators that ONNX Runtime supports in float64; Erf is not among them.

    gelu(x) = x Phi(x) = max(x, 0) - |x| / 2 * erfc(|x| / sqrt(2))

with erfc(z) = t exp(P(2t - 1) - z^2), t = 2 / (2 + z), for z >= 0: the function left for the polynomial is smooth, so
degree 22 interpolates it at Chebyshev nodes to 1e-14. There is no branch, and no cancellation on either side.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
import onnx_ir as ir

from exporters.graph.passes.editing import Change, add_initializer, cast, cast_outputs, hand_over
from exporters.graph.trace import FloatGraph

# log(erfc(z) / t) + z^2 as a polynomial in u = 2t - 1, interpolated at 23 Chebyshev nodes; constant term first.
COEFFICIENTS: Final = (
    -0.6717940840566927, 0.672643223977802, 0.047343306842011185, -0.046895610244143085, -0.009872689367562292,
    0.008824938899850901, 0.001758933506045299, -0.002345816673483697, -0.0001462456950531517, 0.0006737069606787623,
    -9.374528491334426e-05, -0.00017441881475495750, 7.145064077895353e-05, 3.205026913485778e-05,
    -3.0336062369839134e-05, -3.856905494884519e-07, 8.848692464593826e-06, -2.3700336777951846e-06,
    -1.6339025260885658e-06, 8.628311384793214e-07, 1.258701124005832e-07, -1.1973948541866697e-07,
    7.0753942608185435e-09,
)  # fmt: skip
# |x| / sqrt(2) is clamped to this: erfc is 6e-307 there, and its product with any fp32 number is negligible.
_FAR: Final = 26.5


def expand_gelus(model: ir.Model) -> Change:
    """Replace every exact Gelu of float64 values, in place. The tanh form stays: ONNX Runtime has Tanh in float64."""
    changed = []
    for node in list(model.graph):
        value = node.inputs[0] if node.op_type == "Gelu" else None
        exact = node.attributes.get_string("approximate", "none") == "none"
        if value is not None and value.dtype == ir.DataType.DOUBLE and exact:
            changed.append(str(node.name))
            _expand(model.graph, node, value)
    return Change("expand_gelus", tuple(changed))


def _expand(graph: ir.Graph, gelu: ir.Node, x: ir.Value) -> None:
    # Replace one Gelu of a float64 value by the formula of the module's docstring.
    nodes: list[ir.Node] = []

    def apply(op: str, *inputs: ir.Value | float) -> ir.Value:
        operands = [
            add_initializer(graph, f"double_{one!r}", np.array(one, np.float64)) if isinstance(one, float) else one
            for one in inputs
        ]
        nodes.append(ir.node(op, operands, name=f"{gelu.name}/{len(nodes)}"))
        output = nodes[-1].outputs[0]
        output.name, output.type, output.shape = f"{gelu.name}/{len(nodes)}", ir.TensorType(ir.DataType.DOUBLE), x.shape
        return output

    magnitude = apply("Abs", x)
    z = apply("Min", apply("Mul", magnitude, math.sqrt(0.5)), _FAR)
    t = apply("Div", 2.0, apply("Add", z, 2.0))
    u = apply("Sub", apply("Add", t, t), 1.0)
    polynomial = apply("Add", apply("Mul", u, COEFFICIENTS[-1]), COEFFICIENTS[-2])
    for coefficient in COEFFICIENTS[-3::-1]:
        polynomial = apply("Add", apply("Mul", polynomial, u), coefficient)
    tail = apply("Mul", t, apply("Exp", apply("Sub", polynomial, apply("Mul", z, z))))
    lost = apply("Mul", apply("Mul", magnitude, 0.5), tail)
    result = apply("Sub", apply("Max", x, 0.0), lost)
    graph.insert_before(gelu, nodes)
    hand_over(gelu.outputs[0], result)
    graph.remove(gelu, safe=True)


def make_islands(traced: FloatGraph) -> Change:
    """Insert the casts into a quantized float64 graph, in place; the graph's input and output become fp32.

    The result lists the names of the values that are cast.
    """
    graph = traced.model.graph
    changed = [_narrow_input(graph, node) for node in list(graph) if node.op_type == "QuantizeLinear"]
    changed += [_widen(graph, product.node) for product in traced.products]
    return Change("make_islands", (*changed, *_narrow_ends(graph)))


def _narrow_input(graph: ir.Graph, quantize: ir.Node) -> str:
    """Cast to fp32 before a quantizer, and before its Clip."""
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
    """Cast to float64 after a multiplication of codes."""
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
    """Make the graph's input (pixels) and output (logits) fp32, with casts inside; they keep their names."""
    for value in graph.inputs:
        value.type = ir.TensorType(ir.DataType.FLOAT)
        readers = [(node, index) for node, index in value.uses()]
        double = f"{value.name}/double"
        wide = cast(graph, readers[0][0], value, ir.DataType.DOUBLE, f"{double}/Cast", double)
        for node, index in readers:
            node.replace_input_with(index, wide)
    cast_outputs(graph, "double")
    return [str(value.name) for value in (*graph.inputs, *graph.outputs)]
