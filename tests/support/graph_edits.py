"""One change to a graph each, by names: what the tests of the linter break good graphs with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["Edit", "before", "behind", "both", "drop", "find", "opset", "replace", "set_attributes", "store", "stored"]

Edit = Callable[[ir.Model], None]


def find(model: ir.Model, name: str) -> ir.Node:
    """The node of that name."""
    return next(node for node in model.graph if node.name == name)


def stored(model: ir.Model, name: str, array: Any) -> ir.Value:
    """A new initialiser."""
    tensor = ir.tensor(np.asarray(array), name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    model.graph.register_initializer(value)
    return value


def store(name: str, change: Callable[[Any], Any]) -> Edit:
    """An initialiser becomes what `change` makes of its array."""

    def edit(model: ir.Model) -> None:
        value = model.graph.initializers[name]
        tensor = ir.tensor(np.ascontiguousarray(change(value.const_value.numpy())), name=name)
        value.const_value, value.shape, value.type = tensor, tensor.shape, ir.TensorType(tensor.dtype)

    return edit


def set_attributes(node: str, **attributes: Any) -> Edit:
    """A node's attributes; None removes one."""

    def edit(model: ir.Model) -> None:
        found = find(model, node)
        for name, value in attributes.items():
            if value is None:
                found.attributes.pop(name)
            else:
                found.attributes[name] = ir.convenience.convert_attribute(name, value)

    return edit


def behind(node: str, op: str, *operands: Any, names: str = "new", **attributes: Any) -> Edit:
    """A node after another one, for all of its readers; operands are stored arrays."""

    def edit(model: ir.Model) -> None:
        source = find(model, node)
        output = source.outputs[0]
        extra = [stored(model, f"{names}_{index}", array) for index, array in enumerate(operands)]
        made = ir.node(op, [output, *extra], attributes, name=names)
        made.outputs[0].name = f"{names}_out"
        output.replace_all_uses_with(made.outputs[0])
        made.replace_input_with(0, output)
        model.graph.insert_after(source, made)

    return edit


def before(node: str, position: int, op: str, *operands: Any, names: str = "new", **attributes: Any) -> Edit:
    """A node before one operand of another one, for this reader alone; operands are stored arrays."""

    def edit(model: ir.Model) -> None:
        reader = find(model, node)
        extra = [stored(model, f"{names}_{index}", array) for index, array in enumerate(operands)]
        made = ir.node(op, [reader.inputs[position], *extra], attributes, name=names)
        made.outputs[0].name = f"{names}_out"
        model.graph.insert_before(reader, made)
        reader.replace_input_with(position, made.outputs[0])

    return edit


def opset(version: int) -> Edit:
    """Another version of ONNX's operators."""

    def edit(model: ir.Model) -> None:
        model.graph.opset_imports[""] = version

    return edit


def drop(*nodes: str) -> Edit:
    """Nodes whose readers get the first input in their place."""

    def edit(model: ir.Model) -> None:
        for name in nodes:
            node = find(model, name)
            node.outputs[0].replace_all_uses_with(node.inputs[0])
            model.graph.remove(node, safe=True)

    return edit


def replace(node: str, position: int, array: Any, name: str = "other") -> Edit:
    """A node's operand becomes a stored array of its own; the node gets as many operands as that needs."""

    def edit(model: ir.Model) -> None:
        found = find(model, node)
        found.resize_inputs(max(len(found.inputs), position + 1))
        found.replace_input_with(position, stored(model, name, array))

    return edit


def both(*edits: Edit) -> Edit:
    """Several, one after another."""

    def edit(model: ir.Model) -> None:
        for change in edits:
            change(model)

    return edit
