"""Pass: Gemm with a bias becomes MatMul and Add.

Engines run a quantized MatMul on integers and add a float bias afterwards; a quantized Gemm has to have a
quantized bias, or none of it is integer. So no product keeps its bias inside.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from exporters.graph.passes.change import Change
from exporters.graph.passes.tensors import add_initializer
from exporters.graph.trace import PlainGraph, Product

__all__ = ["split_gemms"]


def split_gemms(plain: PlainGraph) -> tuple[PlainGraph, Change]:
    """Replace every Gemm of a layer; the model is changed in place, the products are given anew."""
    products, changed = [], []
    for product in plain.products:
        if product.node.op_type == "Gemm":
            product = dataclasses.replace(product, node=_split(plain.model.graph, product))
            changed.append(product.name)
        products.append(product)
    return PlainGraph(plain.model, tuple(products)), Change("split_gemms", tuple(changed))


def _split(graph: ir.Graph, product: Product) -> ir.Node:
    gemm = product.node
    attributes = gemm.attributes
    plain = attributes.get_float("alpha", 1.0) == attributes.get_float("beta", 1.0) == 1.0
    if not plain or attributes.get_int("transA", 0) != 0:
        raise ValueError(f"{gemm.name} is no plain product with a bias")
    x, weight = gemm.inputs[0], gemm.inputs[1]
    assert weight is not None
    assert weight.const_value is not None
    stored = weight
    if attributes.get_int("transB", 0):
        weight = add_initializer(graph, f"{product.name}.weight_t", np.ascontiguousarray(weight.const_value.numpy().T))
    output = gemm.outputs[0]
    matmul = ir.node("MatMul", [x, weight], name=gemm.name)
    matmul.metadata_props.update(gemm.metadata_props)
    nodes = [matmul]
    if len(gemm.inputs) > 2 and gemm.inputs[2] is not None:
        nodes.append(ir.node("Add", [matmul.outputs[0], gemm.inputs[2]]))
    for node in nodes:
        node.outputs[0].type, node.outputs[0].shape = output.type, output.shape
    graph.insert_before(gemm, nodes)
    _hand_over(graph, output, nodes[-1].outputs[0])
    graph.remove(gemm, safe=True)
    if not stored.uses() and stored.name is not None:  # no float copy of a weight may stay behind
        graph.initializers.pop(stored.name, None)
    return matmul


def _hand_over(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """`new` takes the place and the name of `old`."""
    name = old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = None, name
