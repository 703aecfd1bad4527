"""Makes the graph of a whole decoder from the graphs of one layer of each kind.

The graph of a layer is copied for every layer of its kind, and each copy gets the tensors of its layer, which are read
when they are written or compared. What precedes and follows the layers is that of the first kind; a further kind
computes for itself what its layers share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Final

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from exporters.graph.passes.editing import Change, as_array
from exporters.tensorrt.half import NotHalf, refuse_not_half
from exporters.tensorrt.language.graph import (
    TORCH_TYPES,
    TRANSPOSED,
    DecoderGraph,
    Joints,
    cache_names,
    cache_shape,
    decoder_graph,
    refuse_beyond,
)
from exporters.tensorrt.language.kinds import Parts, is_own, split, templates_of
from exporters.tensorrt.language.passes import check_half_blocks
from exporters.tensorrt.language.source import LanguageModel
from exporters.tensorrt.language.stream import NotLayered, open_stream
from exporters.tensorrt.language.template import Template, trace_template
from exporters.tensorrt.target import Base
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.numerics.nvfp4 import BLOCK, BlockCodes

LAYERED: Final = "layers"  # what the manifest says of such a graph
# The parts of a weight in NVFP4, by the ends of their names.
_PARTS: Final = {
    "weight": ir.DataType.FLOAT4E2M1, "weight_block_scale": ir.DataType.FLOAT8E4M3FN,
    "weight_tensor_scale": ir.DataType.FLOAT,
}  # fmt: skip


def traced_graph(model: LanguageModel, scales: Mapping[str, float], base: Base, *, cache: bool) -> DecoderGraph:
    """The graph of an artifact, from traces of single layers; traced as a whole where its layers do not allow that.

    Raises:
        ConfigurationError: the model cannot be traced, or its layers are not found in the graph.
        LintFindingsError: a scale or a tensor that FP16 cannot represent.
    """
    try:
        return layered_graph(model, scales, base, cache=cache)
    except NotLayered as why:
        return replace(decoder_graph(model, scales, base, cache=cache), traced=f"whole: {why}")


def layered_graph(model: LanguageModel, scales: Mapping[str, float], base: Base, *, cache: bool) -> DecoderGraph:
    """The same graph as `decoder_graph` makes, under other names, from traces of single layers.

    Raises:
        LintFindingsError: a scale or a tensor that FP16 cannot represent.
        NotLayered: the model has to be traced as a whole.
    """
    refuse_beyond(model, base)
    stream = open_stream(model, TORCH_TYPES[base])
    decoder, prefix = stream.model, stream.prefix
    facts = cache_shape(decoder)

    def trace(index: int) -> Template:
        try:
            return trace_template(model, decoder, prefix, index, scales, base, cache=cache)
        except ConfigurationError as error:  # where the whole model cannot be traced either, that error is told
            raise NotLayered(f"layer {index} cannot be traced alone: {error.why or error.what}") from error

    templates = templates_of(stream.layers, trace)
    with refuse_not_half(str(model.root), "export with --base fp32"):
        stitcher = _Stitcher(model, scales, base, templates, prefix)
        graph = stitcher.graph(cache=cache)
    return DecoderGraph(graph, stitcher.changes(), facts if cache else None, stitcher.joints, LAYERED)


class _Stitcher:
    """Copies templates into one graph."""

    def __init__(
        self, source: LanguageModel, scales: Mapping[str, float], base: Base, templates: Sequence[Template], prefix: str
    ) -> None:
        self.source, self.scales, self.templates, self.prefix = source, scales, templates, prefix
        self.torch_type = TORCH_TYPES[base]
        self.float_type = ir.DataType.FLOAT16 if base is Base.FP16 else ir.DataType.FLOAT
        self.readers = _readers(source)
        self.nodes: list[ir.Node] = []
        self.stored: dict[str, ir.Value] = {}
        self.inputs: dict[str, ir.Value] = {}
        self.hidden: list[str] = []
        self.shared: dict[str, None] = {}

    @property
    def joints(self) -> Joints:
        """Names of the values between layers."""
        return Joints(tuple(self.hidden), tuple(self.shared))

    def graph(self, *, cache: bool) -> ir.Model:
        """The graph of all layers."""
        first = self.templates[0]
        parts = {id(template): split(template, first=template is first) for template in self.templates}
        outside: dict[int, dict[ir.Value, ir.Value]] = {}
        present: list[ir.Value] = []
        current: ir.Value | None = None
        for index, template in enumerate(self.templates):
            if id(template) not in outside:
                outside[id(template)] = self._before(template, parts[id(template)], index)
            known = outside[id(template)]
            current = known[template.entry] if current is None else current
            self.hidden.append(str(current.name))
            values = known | {template.entry: current} | self._caches(template, index)
            self._copy(parts[id(template)].layer, values, template, index)
            self._note_shared(parts[id(template)].layer, template, known)
            current = values[template.exit]
            present += [values[value] for value in list(template.model.graph.outputs)[1:]]
        assert current is not None
        self.hidden.append(str(current.name))
        values = outside[id(first)] | {first.exit: current}
        self._copy(parts[id(first)].behind, values, first, None)
        for value, name in zip(present, cache_names(len(self.templates), "present") if cache else [], strict=True):
            value.name = name
        logits = values[first.model.graph.outputs[0]]
        made = ir.Graph(
            list(self.inputs.values()), [logits, *present], nodes=self.nodes, initializers=list(self.stored.values()),
            opset_imports=dict(first.model.graph.opset_imports), name=first.model.graph.name,
        )  # fmt: skip
        like = first.model
        return ir.Model(
            made, ir_version=like.ir_version, producer_name=like.producer_name, producer_version=like.producer_version
        )

    def changes(self) -> tuple[Change, ...]:
        """What the passes changed, counted in the whole graph."""
        found: dict[str, list[str]] = {}
        for index, template in enumerate(self.templates):
            for change in template.changes:
                of_layer = [name for name in change.changed if name.startswith(template.place)]
                others = [name for name in change.changed if name not in of_layer] if index == 0 else []
                here = f"{self.prefix}.{index}."
                found.setdefault(change.name, []).extend(
                    [*others, *(f"{here}{name.removeprefix(template.place)}" for name in of_layer)]
                )
        return tuple(Change(name, tuple(changed)) for name, changed in found.items())

    def _before(self, template: Template, parts: Parts, index: int) -> dict[ir.Value, ir.Value]:
        """What a kind's layers read that is computed before them; the first kind's names are the tracer's."""
        values: dict[ir.Value, ir.Value] = {}
        for value in list(template.model.graph.inputs)[:3]:
            values[value] = self._input(value, str(value.name))
        self._copy(parts.before, values | self._caches(template, 0), template, None if index == 0 else index, values)
        return values

    def _caches(self, template: Template, index: int) -> dict[ir.Value, ir.Value]:
        caches = list(template.model.graph.inputs)[3:]
        names = cache_names([index] if caches else [])
        return {value: self._input(value, name) for value, name in zip(caches, names, strict=True)}

    def _input(self, like: ir.Value, name: str) -> ir.Value:
        return self.inputs.setdefault(name, ir.Value(name=name, type=like.type, shape=like.shape))

    def _copy(
        self, nodes: Sequence[ir.Node], values: dict[ir.Value, ir.Value], template: Template, index: int | None,
        known: dict[ir.Value, ir.Value] | None = None,
    ) -> None:  # fmt: skip
        """Append copies of nodes; `values` are the copies of what they read, and get what they compute.

        Names get the number of a layer, unless it is None.
        """
        for node in nodes:
            read = [None if value is None else self._read(value, values, template, index) for value in node.inputs]
            made = ir.Node(
                node.domain, node.op_type, read, list(node.attributes.values()), num_outputs=len(node.outputs),
                name=self._renamed(str(node.name), template, index),
            )  # fmt: skip
            for old, new in zip(node.outputs, made.outputs, strict=True):
                new.name, new.type, new.shape = self._renamed(str(old.name), template, index), old.type, old.shape
                values[old] = new
                if known is not None:
                    known[old] = new
            self.nodes.append(made)

    def _renamed(self, name: str, template: Template, index: int | None) -> str:
        if index is None:
            return name
        if name.startswith(template.place):
            return f"{self.prefix}.{index}.{name.removeprefix(template.place)}"
        return f"{self.prefix}.{index}/{name}"

    def _read(
        self, value: ir.Value, values: dict[ir.Value, ir.Value], template: Template, index: int | None
    ) -> ir.Value:
        if value in values:
            return values[value]
        if value.const_value is None:
            raise NotLayered(f"{value.name} is computed neither before the layers nor in one")
        return self._store(value, template, index)

    def _note_shared(self, nodes: Sequence[ir.Node], template: Template, known: Mapping[ir.Value, ir.Value]) -> None:
        for value in (value for node in nodes for value in node.inputs if value is not None and value in known):
            if value is not template.entry and known[value].producer() is not None:
                self.shared[str(known[value].name)] = None

    def _store(self, value: ir.Value, template: Template, index: int | None) -> ir.Value:
        """The stored tensor of a layer that stands for a template's."""
        name, parameter = str(value.name), template.parameters.get(str(value.name))
        if parameter is not None:
            full = self._renamed(parameter.name, template, index) if is_own(value, template) else parameter.name
            stored = f"{full}{TRANSPOSED}" if parameter.transposed else full
            return self.stored.get(stored) or self._add(value, stored, self._float(full, parameter.transposed, value))
        if not name.startswith(template.place):
            return self._constant(value, name, template)
        full = self._renamed(name, template, index)
        return self.stored.get(full) or self._add(value, full, self._quantized(full))

    def _constant(self, value: ir.Value, name: str, template: Template) -> ir.Value:
        """A constant that is no parameter. The first kind's have the tracer's names; others share equal ones."""
        tensor = value.const_value
        assert tensor is not None
        mine = name if template is self.templates[0] else f"{self.prefix}.{self.templates.index(template)}/{name}"
        for known in (name, mine):
            found = self.stored.get(known)
            held = None if found is None else found.const_value
            alike = held is not None and (held.dtype, held.shape) == (tensor.dtype, tensor.shape)
            if found is not None and held is not None and alike and held.tobytes() == tensor.tobytes():
                return found
        if mine in self.stored:
            raise NotLayered(f"{name} is another constant in every layer")
        return self._add(value, mine, tensor)

    def _add(self, like: ir.Value, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        made = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=like.shape, const_value=tensor)
        self.stored[name] = made
        return made

    def _float(self, name: str, transposed: bool, value: ir.Value) -> ir.TensorProtocol:
        reader, dtype = self.readers[name], value.dtype
        assert dtype is not None
        assert value.shape is not None

        def read() -> ir.TensorProtocol:
            tensor = reader().to(self.torch_type).T if transposed else reader().to(self.torch_type)
            return ir.tensor(np.ascontiguousarray(tensor.numpy().astype(dtype.numpy())), name=name)

        return ir.LazyTensor(read, dtype, ir.Shape(value.shape), name=name)

    def _quantized(self, name: str) -> ir.TensorProtocol:
        """Codes, their scales, or the scale of an input."""
        if name.endswith(".input/scale"):
            return self._scale(name, np.array(self.scales[name.removesuffix(".input/scale")], np.float32))
        if self.source.packed:
            return self._packed(name)
        if name.endswith(".weight_scale"):
            return self._scale(name, as_array(self.source.weight_scales[name.removesuffix(".weight_scale")].float()))
        module = name.removesuffix(".weight")
        if module not in self.source.weights:
            raise NotLayered(f"{name} is no tensor of the artifact")

        def read() -> ir.TensorProtocol:
            return ir.tensor(np.ascontiguousarray(as_array(self.source.weights[module].codes).T), name=name)

        rows, columns = self.source.plan.structure.shape(module)
        return ir.LazyTensor(read, ir.DataType.FLOAT8E4M3FN, ir.Shape((columns, rows)), name=name)

    def _packed(self, name: str) -> ir.TensorProtocol:
        """Codes of a weight in NVFP4, its block scales, or its tensor scale."""
        module, _, part = name.rpartition(".")
        if module not in self.source.weights or part not in _PARTS:
            raise NotLayered(f"{name} is no tensor of the artifact")
        weights, dtype = self.source.weights, _PARTS[part]

        def read() -> ir.TensorProtocol:
            weight = weights[module]
            assert isinstance(weight, BlockCodes)
            array = weight.codes.numpy() if dtype is ir.DataType.FLOAT4E2M1 else as_array(weight.scales.block)
            return ir.tensor(np.ascontiguousarray(array.T).view(dtype.numpy()), name=name)

        if dtype is ir.DataType.FLOAT:
            weight = weights[module]
            assert isinstance(weight, BlockCodes)
            if self.torch_type is torch.float16:
                check_half_blocks(f"{module}.weight", weight.scales)
            return self._scale(name, np.array(weight.scales.tensor, np.float32))
        rows, columns = self.source.plan.structure.shape(module)
        sides = columns if dtype is ir.DataType.FLOAT4E2M1 else columns // BLOCK, rows
        return ir.LazyTensor(read, dtype, ir.Shape(sides), name=name)

    def _scale(self, name: str, array: Any) -> ir.TensorProtocol:
        typed = array.astype(self.float_type.numpy())
        if not np.array_equal(typed.astype(np.float32), array):
            raise NotHalf(name, "a scale that FP16 does not hold exactly")
        return ir.tensor(typed, name=name)


def _readers(source: LanguageModel) -> dict[str, Callable[[], Tensor]]:
    """What reads each float tensor, by the model's names of it; tied tensors have several."""
    found: dict[str, Callable[[], Tensor]] = {}
    for name in source.floats:
        found[source.plan.names[name].name] = partial(source.floats.__getitem__, name)
    for tied, original in source.plan.structure.tied.items():
        known = found.get(original) or found.get(tied)
        if known is not None:
            found.setdefault(tied, known)
            found.setdefault(original, known)
    return found
