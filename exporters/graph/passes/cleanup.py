"""Passes: names that say which layer a node belongs to, and nothing of the machine that exported it.

The names are how everything after the export (comparison, engine reports, people) finds a layer again.
"""

from __future__ import annotations

import onnx_ir as ir

from exporters.graph.passes.editing import Change, stored_bias
from exporters.graph.trace import FloatGraph, ProductKind
from fp8pipe.core.version import __version__

__all__ = ["SUFFIXES", "name_products", "strip_metadata"]

# A product's node is called LAYER + suffix.
SUFFIXES = {
    ProductKind.LINEAR: "/MatMul",
    ProductKind.PATCH: "/Conv",
    ProductKind.QK: "/qk",
    ProductKind.AV: "/av",
}


def name_products(traced: FloatGraph) -> Change:
    """Name products and their bias after their layers: `NAME/MatMul`, `NAME/Add`, `NAME/qk`, ..."""
    for product in traced.products:
        product.node.name = product.name + SUFFIXES[product.kind]
        output = product.node.outputs[0]
        if product.kind is ProductKind.LINEAR:
            add = stored_bias(product.node)
            if add is not None:
                add.name = f"{product.name}/Add"
                _name(output, f"{product.name}/product")
                output = add.outputs[0]
        suffix = "/logits" if product.kind is ProductKind.QK else "/output"
        _name(output, product.name + suffix)
    return Change("name_products", tuple(product.name for product in traced.products))


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


def _name(value: ir.Value, name: str) -> None:
    """Outputs of the whole graph keep their name."""
    if not value.is_graph_output():
        value.name = name
