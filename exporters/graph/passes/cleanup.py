"""Passes: names that say which layer a node belongs to, and nothing of the machine that exported it.

The names are how everything after the export (comparison, engine reports, people) finds a layer again.
"""

from __future__ import annotations

import onnx_ir as ir

from exporters.graph.passes.change import Change
from exporters.graph.trace import PlainGraph, Product, ProductKind
from fp8pipe import __version__

__all__ = ["SUFFIXES", "name_products", "strip_metadata"]

# A product's node is called LAYER + suffix.
SUFFIXES = {
    ProductKind.LINEAR: "/MatMul",
    ProductKind.PATCH: "/Conv",
    ProductKind.QK: "/qk",
    ProductKind.AV: "/av",
}


def name_products(plain: PlainGraph) -> Change:
    """Name products and their bias after their layers: `NAME/MatMul`, `NAME/Add`, `NAME/qk`, ..."""
    for product in plain.products:
        product.node.name = product.name + SUFFIXES[product.kind]
        output = product.node.outputs[0]
        if product.kind is ProductKind.LINEAR:
            add = _bias(product)
            if add is not None:
                add.name = f"{product.name}/Add"
                _name(output, f"{product.name}/product")
                output = add.outputs[0]
        suffix = "/logits" if product.kind is ProductKind.QK else "/output"
        _name(output, product.name + suffix)
    return Change("name_products", tuple(product.name for product in plain.products))


def strip_metadata(model: ir.Model) -> Change:
    """Drop the exporter's notes (they hold paths of this machine), dead nodes and dead tensors."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    stripped = []
    for node in model.graph:
        if node.metadata_props or node.doc_string:
            stripped.append(node.name or "")
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for holder in (model, model.graph):
        holder.metadata_props.clear()
        holder.doc_string = None
    RemoveUnusedNodesPass()(model)
    for name in list(model.graph.initializers):
        if name.startswith("model."):
            model.graph.initializers[name].name = name.removeprefix("model.")
    model.producer_name, model.producer_version = "fp8pipe", __version__
    model.graph.name = "vision_transformer"
    return Change("strip_metadata", tuple(stripped))


def _bias(product: Product) -> ir.Node | None:
    """The Add behind a linear's MatMul, if there is one and it adds a stored vector."""
    uses = product.node.outputs[0].uses()
    if len(uses) != 1:
        return None
    ((node, index),) = uses
    if node.op_type != "Add":
        return None
    other = node.inputs[1 - index]
    stored = other is not None and other.const_value is not None and len(other.const_value.shape) == 1
    return node if stored else None


def _name(value: ir.Value, name: str) -> None:
    """Outputs of the whole graph keep their name."""
    if not value.is_graph_output():
        value.name = name
