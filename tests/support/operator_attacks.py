"""Attacks on the operators between the products of a vision model's graph, and what must be named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from artifact_tree import rehash
from graph_edits import behind, drop, set_attributes, stored

from exporters.graph.formats import MODEL_FILE

__all__ = ["ATTACKS", "attack"]


def first(model: ir.Model, op: str) -> ir.Node:
    return next(node for node in model.graph if node.op_type == op)


def on_first(op: str, edit):
    """The edit of the first node of that operator, which is what must be named."""
    return lambda model: edit(str(first(model, op).name))(model)


def relu(model: ir.Model) -> None:
    node = first(model, "Gelu")
    node.op_type = "Relu"
    node.attributes.clear()


def scale_twice(model: ir.Model) -> None:
    """The queries of one block, after the factor 1/sqrt(d)."""
    clip = next(node for node in model.graph if node.name == "blocks.0.attn.q/Clip")
    two = np.full_like(clip.inputs[1].const_value.numpy(), 2)
    behind(clip.inputs[0].producer().name, "Mul", two)(model)


def drop_residual(model: ir.Model) -> None:
    norm = [node for node in model.graph if node.op_type == "LayerNormalization"][1]
    drop(norm.inputs[0].producer().name)(model)


def other_token(model: ir.Model) -> None:
    """The classifier reads a patch instead of the class token."""
    node = [node for node in model.graph if node.op_type == "Gather"][-1]
    node.replace_input_with(1, stored(model, "another", np.array(1, np.int64)))


def after_the_head(model: ir.Model) -> None:
    output = model.graph.outputs[0]
    node = ir.node("Mul", [output, stored(model, "twice", np.float32(2))], name="louder")
    model.graph.append(node)
    output.name, node.outputs[0].name = "before", output.name
    node.outputs[0].type, node.outputs[0].shape = output.type, output.shape
    model.graph.outputs[0] = node.outputs[0]


ATTACKS = {
    "gelu-relu": (relu, "node_gelu"),
    "gelu-tanh": (on_first("Gelu", lambda name: set_attributes(name, approximate="tanh")), "node_gelu"),
    "attention-scale": (scale_twice, "new"),
    "norm-epsilon": (on_first("LayerNormalization", lambda n: set_attributes(n, epsilon=1e-3)), "node_layer_norm"),
    "norm-epsilon-fourfold": (set_attributes("node_layer_norm_3", epsilon=4e-6), "node_layer_norm_3"),
    "norm-epsilon-tenfold": (
        on_first("LayerNormalization", lambda n: set_attributes(n, epsilon=1e-5)), "node_layer_norm",
    ),
    "softmax-axis": (on_first("Softmax", lambda n: set_attributes(n, axis=-2)), "node_softmax"),
    "residual": (drop_residual, "node_layer_norm_1"),
    "token": (other_token, "node_select"),
    "output": (after_the_head, "louder"),
}  # fmt: skip


def attack(export: Path, edit) -> Path:
    model = ir.load(export / MODEL_FILE)
    edit(model)
    ir.save(model, export / MODEL_FILE)
    return rehash(export)
