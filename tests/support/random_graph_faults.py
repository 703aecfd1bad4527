"""Random faults in the graph of an export: operators, attributes, wiring and stored numbers, chosen by a seed.

Each function takes a source of chance and the export's directory, writes the changed graph, and returns what it did and
the names that a finding may use.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = ["attribute", "inserted", "operator", "stored", "wiring"]

GRAPH = "model.onnx"


def _edited(root: Path, edit: Callable[[ir.Model], tuple[str, tuple[str, ...]]]) -> tuple[str, tuple[str, ...]]:
    model = ir.load(root / GRAPH)
    found = edit(model)
    ir.save(model, root / GRAPH)
    return found


def _labels(node: ir.Node) -> tuple[str, ...]:
    # A graph that no longer fits together is refused by its reader, which names the file.
    return (str(node.name), str(node.outputs[0].name), GRAPH)


_SAME_SHAPE = (
    "Add", "Sub", "Mul", "Div", "Clip", "Softmax", "LayerNormalization", "Gelu", "Erf", "Tanh", "Relu", "Sqrt", "Cast",
    "Identity", "Sigmoid",
)  # fmt: skip
_OTHER_OPERATOR = {
    "Add": ("Sub", "Mul", "Max"), "Sub": ("Add",), "Mul": ("Div", "Add"), "Div": ("Mul",), "Gelu": ("Relu", "Tanh"),
    "Softmax": ("LogSoftmax", "Hardmax"), "Tanh": ("Sigmoid",), "Relu": ("Tanh",), "Erf": ("Tanh",),
}  # fmt: skip


def operator(chance: random.Random, root: Path) -> tuple[str, tuple[str, ...]]:
    """An operator is another one, or is left out."""

    def edit(model: ir.Model) -> tuple[str, tuple[str, ...]]:
        node = chance.choice([node for node in model.graph if node.op_type in _SAME_SHAPE])
        how, labels = f"{node.op_type} {node.name}", _labels(node)
        if node.op_type in _OTHER_OPERATOR and chance.random() < 0.5:
            node.op_type = chance.choice(_OTHER_OPERATOR[node.op_type])
            if node.op_type in ("Relu", "Tanh", "Sigmoid"):
                node.attributes.clear()
            return f"{how} -> {node.op_type}", labels
        source = next(v for v in node.inputs if v is not None and v.const_value is None)
        node.outputs[0].replace_all_uses_with(source, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        return f"{how} left out", labels

    return _edited(root, edit)


def inserted(chance: random.Random, root: Path) -> tuple[str, tuple[str, ...]]:
    """An operator that nobody asked for stands between two others."""

    def edit(model: ir.Model) -> tuple[str, tuple[str, ...]]:
        node = chance.choice([node for node in model.graph if node.op_type in _SAME_SHAPE[:8]])
        kind, operand = chance.choice((("Mul", 1.05), ("Add", 0.05), ("Relu", None), ("Mul", 2.0), ("Clip", -0.1)))
        extra = [] if operand is None else [ir.tensor(np.float32(operand), name="random_fault_value")]
        values = [
            ir.Value(name=t.name, type=ir.TensorType(t.dtype), shape=t.shape, const_value=t) for t in extra
        ]  # fmt: skip
        for value in values:
            model.graph.register_initializer(value)
        source = node.outputs[0]
        made = ir.node(kind, [source, *values], name="random_fault")
        made.outputs[0].name = "random_fault_out"
        made.outputs[0].type, made.outputs[0].shape = source.type, source.shape
        source.replace_all_uses_with(made.outputs[0])
        made.replace_input_with(0, source)
        model.graph.insert_after(node, made)
        return f"{kind} {operand} behind {node.name}", ("random_fault", *_labels(node))

    return _edited(root, edit)


def attribute(chance: random.Random, root: Path) -> tuple[str, tuple[str, ...]]:
    """An attribute has another value."""

    def edit(model: ir.Model) -> tuple[str, tuple[str, ...]]:
        kinds = (ir.AttributeType.FLOAT, ir.AttributeType.INT, ir.AttributeType.INTS, ir.AttributeType.STRING)
        given = [(n, a) for n in model.graph for a in n.attributes.values() if a.type in kinds]
        # Without a side of 0 this one changes nothing that is computed: `verify` names it, no engine can.
        found = [(node, attribute) for node, attribute in given if attribute.name != "allowzero"]
        node, attribute = chance.choice(found)
        value: Any = attribute.value
        if isinstance(value, float):
            changed: Any = value * 3 + 1e-6
        elif isinstance(value, int):
            changed = value + chance.choice((1, -1))
        elif isinstance(value, str):
            changed = {"none": "tanh", "tanh": "none"}.get(value, "other")
        else:
            changed = list(reversed(value)) if list(reversed(value)) != list(value) else [v + 1 for v in value]
        node.attributes[attribute.name] = ir.Attr(attribute.name, attribute.type, changed)
        return f"{node.name}: {attribute.name} {value!r} -> {changed!r}", _labels(node)

    return _edited(root, edit)


def wiring(chance: random.Random, root: Path) -> tuple[str, tuple[str, ...]]:
    """Two operands change places, or an operand is another value of the graph."""

    def edit(model: ir.Model) -> tuple[str, tuple[str, ...]]:
        nodes = [n for n in model.graph if n.op_type in ("Add", "Sub", "Mul", "Div", "MatMul")]
        node = chance.choice([n for n in nodes if n.inputs[0] is not n.inputs[1]])
        a, b = node.inputs
        if node.op_type in ("Sub", "Div", "MatMul"):
            node.replace_input_with(0, b)
            node.replace_input_with(1, a)
            return f"operands of {node.name} exchanged", _labels(node)
        node.replace_input_with(1, a)
        return f"both operands of {node.name} are {a.name}", _labels(node)

    return _edited(root, edit)


def stored(chance: random.Random, root: Path) -> tuple[str, tuple[str, ...]]:
    """One number of a stored tensor is another."""

    def edit(model: ir.Model) -> tuple[str, tuple[str, ...]]:
        read = [v for v in model.graph.initializers.values() if v.const_value is not None and v.uses()]
        value = chance.choice(sorted(read, key=lambda v: str(v.name)))
        array = value.const_value.numpy().copy()
        flat = array.reshape(-1)
        place = chance.randrange(flat.size)
        before = flat[place]
        if array.dtype.kind == "f":
            flat[place] = np.nextafter(before, array.dtype.type(np.inf)) if chance.random() < 0.5 else before + 0.25
        else:
            flat[place] = before + 1 if int(before) < np.iinfo(array.dtype).max else before - 1
        tensor = ir.tensor(array, name=value.name)
        value.const_value = tensor
        readers = [label for usage in value.uses() for label in _labels(usage[0])[:2]]
        owner = str(value.name).removesuffix("_scale").removesuffix("_zero_point").removesuffix(".weight")
        return f"{value.name}[{place}]: {before} -> {flat[place]}", (str(value.name), owner, *readers, GRAPH)

    return _edited(root, edit)
