"""Which decoder layers of a model have the same graph, and which nodes of a traced graph make up its layer.

Layers whose modules have the same classes, sizes and settings are of one kind. The first and the last layer of a kind
are traced; if their graphs differ although the modules do not (a layer may compute with its own number), each layer
is traced for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import onnx_ir as ir
from torch import nn

from exporters.graph.parity import way_between
from exporters.tensorrt.language.stream import NotLayered
from exporters.tensorrt.language.template import Template

_NOT_SETTINGS: Final = ("layer_idx", "training")


def templates_of(layers: nn.ModuleList, trace: Callable[[int], Template]) -> list[Template]:
    """The template of every layer; layers of one kind share theirs."""
    kinds: dict[Any, list[int]] = {}
    for index, layer in enumerate(layers):
        kinds.setdefault(_settings(layer), []).append(index)
    found: dict[int, Template] = {}
    for members in kinds.values():
        first = trace(members[0])
        alike = len(members) == 1 or _described(first) == _described(trace(members[-1]))
        found |= {index: first if alike or index == members[0] else trace(index) for index in members}
    return [found[index] for index in range(len(layers))]


def _settings(layer: nn.Module) -> Any:
    """All that tells kinds of layers apart: classes, sizes, and every plain attribute except for the layer's number."""
    found = []
    for name, module in layer.named_modules():
        plain = {
            key: value for key, value in vars(module).items()
            if key not in _NOT_SETTINGS and isinstance(value, bool | int | float | str | None)
        }  # fmt: skip
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        shapes = tuple((key, tuple(tensor.shape), tensor.dtype) for key, tensor in tensors)
        found.append((name, type(module), module.extra_repr(), tuple(sorted(plain.items())), shapes))
    return tuple(found)


def _described(template: Template) -> list[Any]:
    """A graph without its names: nodes, attributes and constants, and of other stored tensors, only which they are."""
    numbers: dict[ir.Value | None, Any] = {}

    def shown(value: ir.Value | None) -> Any:
        if value is None or value.const_value is None:
            return numbers.setdefault(value, len(numbers))
        name = str(value.name)
        if name in template.parameters or name.startswith(template.place):
            return name.removeprefix(template.place), template.parameters.get(name)
        return str(value.const_value.dtype), value.const_value.numpy().tolist()

    for value in (*template.model.graph.inputs, template.entry, template.exit, *template.shared):
        shown(value)
    return [
        (node.domain, node.op_type, [shown(value) for value in node.inputs], [shown(value) for value in node.outputs],
         {key: _plain(attribute) for key, attribute in node.attributes.items()})
        for node in template.model.graph
    ]  # fmt: skip


def _plain(attribute: ir.Attr) -> Any:
    value = attribute.value
    return value.numpy().tolist() if hasattr(value, "numpy") else value


@dataclass(frozen=True, slots=True)
class Parts:
    """The nodes of a template, in its order: before its layer, in it, behind it."""

    before: list[ir.Node]
    layer: list[ir.Node]
    behind: list[ir.Node]


def split(template: Template, *, first: bool) -> Parts:
    """Nodes that depend on the layer's hidden state, cache or tensors make up the layer; what depends on its output
    lies behind it; the rest, also shapes that it reads, is computed once before all layers. Only the `first` template's
    hidden state is."""
    graph = template.model.graph
    outputs = [template.exit, *graph.outputs[1:]]
    inside, _, _ = way_between([template.entry, *template.shared], outputs)
    caches = set(list(graph.inputs)[3:])
    own: set[ir.Value] = {template.entry, *caches}
    layer = []
    for node in inside:
        if any(value in own or is_own(value, template) for value in node.inputs if value is not None):
            layer.append(node)
            own.update(node.outputs)
    later: set[ir.Value] = {template.exit}
    behind = []
    for node in graph:
        if node not in layer and any(value in later for value in node.inputs if value is not None):
            behind.append(node)
            later.update(node.outputs)
    made = {value for node in (*layer, *behind) for value in node.outputs}
    reads = [value for node in (*layer, *behind) for value in node.inputs if value is not None and value not in made]
    seeds = [*template.shared, *(value for value in reads if value is not template.entry)]
    before, _, _ = way_between([], [template.entry, *seeds] if first else seeds)
    if any(value in (template.entry, template.exit) for node in before for value in node.inputs):
        raise NotLayered("what is computed before the layers depends on one")
    return Parts(before, layer, behind)


def is_own(value: ir.Value, template: Template) -> bool:
    """Whether a stored tensor belongs to the layer."""
    name = str(value.name)
    parameter = template.parameters.get(name)
    return value.const_value is not None and (name if parameter is None else parameter.name).startswith(template.place)
