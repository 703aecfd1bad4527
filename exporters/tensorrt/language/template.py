"""Traces one decoder layer of a model, with what surrounds all of them, into a graph of one layer.

Every parameter is a constant of its own value while the model is traced, so that each stored tensor of the graph tells
by its number which parameter it is, also where the tracer has transposed or converted it. Parameters with equal values,
which the tracer would store once, stay apart.

What the layer reads and returns are outputs of the traced graph as well, until it is cut there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from exporters.graph.passes.editing import Change
from exporters.graph.trace import FloatGraph, export_program
from exporters.tensorrt.language.graph import additive_mask, assign, cache_shape, example, name_ports, type_graph
from exporters.tensorrt.language.source import LanguageModel
from exporters.tensorrt.language.stream import NotLayered, tensors_in
from exporters.tensorrt.target import Base
from fp8pipe.models.language.kv_cache import cache_argument

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FIRST, _STEP, _MOST = 0.25, 2.0**-12, 3072  # FP16 represents these constants exactly
_FIX: Final = "export with --format modelopt-checkpoint, or --target vllm"


@dataclass(frozen=True, slots=True)
class Parameter:
    """The parameter that a stored tensor was traced from."""

    name: str  # the model's name of it
    transposed: bool  # whether it is stored transposed


@dataclass(frozen=True, slots=True)
class Template:
    """A typed graph of one decoder layer, with embedding and head. Its names are those of a model of one layer."""

    model: ir.Model
    place: str  # name of the layer in the graph, with a dot behind it
    entry: ir.Value  # the hidden state that the layer reads
    shared: tuple[ir.Value, ...]  # what else it reads that is computed before the layers: mask, rotary angles
    exit: ir.Value  # the hidden state that it returns
    parameters: Mapping[str, Parameter]  # by the name of the stored tensor
    changes: tuple[Change, ...]  # what the passes changed


def trace_template(
    source: LanguageModel, model: PreTrainedModel, prefix: str, index: int, scales: Mapping[str, float], base: Base, *,
    cache: bool,
) -> Template:  # fmt: skip
    """Trace layer `index` of a model whose layers are listed under `prefix`; parameters are overwritten.

    Raises:
        ConfigurationError: it cannot be traced.
        LintFindingsError: a scale that FP16 cannot represent.
        NotLayered: a stored tensor was computed from parameters, so it would be another one in the next layer.
    """
    here, there = f"{prefix}.{index}.", f"{prefix}.0."
    names = {f"{there}{name.removeprefix(here)}": name for name in source.weights if name.startswith(here)}
    with _alone(model, prefix, index):
        constants = _write_constants(model)
        shape = cache_shape(model).model_copy(update={"layers": 1})
        arguments, dynamic = example(shape, model.dtype, cache=cache)
        with _OneLayer(model, model.get_submodule(f"{prefix}.0"), index) as traced_model:
            graph = export_program(traced_model, arguments, dynamic, type(model).__name__, _FIX)
        products = tuple(assign(graph, model, list(names)))
    outputs = graph.graph.outputs
    marks = list(outputs)[3 if cache else 1 :]
    del outputs[3 if cache else 1 :]
    name_ports(graph, [0] if cache else [])
    parameters = parameters_of(graph, constants)
    changes = type_graph(
        FloatGraph(graph, products), {name: source.weights[known] for name, known in names.items()},
        {name: scales[known] for name, known in names.items() if known in scales}, base, str(source.root),
    )  # fmt: skip
    kept = graph.graph.initializers.values()
    found = {str(value.name): parameters[value] for value in kept if value in parameters}
    shared = tuple(mark for mark in dict.fromkeys(marks[1:-1]) if mark.producer() is not None and mark.uses())
    return Template(graph, there, marks[0], shared, marks[-1], found, tuple(changes))


class _OneLayer(nn.Module):
    """`_Decoder` for a model with one of its layers, which gets its cache alone; returns also what the layer reads."""

    def __init__(self, model: PreTrainedModel, layer: nn.Module, index: int) -> None:
        super().__init__()
        self.model, self.index = model, index
        self.eval()
        self.read: list[Tensor] = []
        self.made: list[Tensor] = []
        self.hooks = (
            layer.register_forward_pre_hook(self._before, with_kwargs=True), layer.register_forward_hook(self._after),
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _before(self, layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.read[:] = tensors_in((given, named))

    def _after(self, layer: nn.Module, given: Any, made: Any) -> None:
        self.made[:] = tensors_in(made)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor,
        past: list[tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        cache: Any = None
        if past is not None:
            from transformers import DynamicCache

            cache = DynamicCache(config=self.model.config)
            for slot in sorted({0, self.index}):  # the length of the first layer's past is the model's
                cache.update(*past[0], slot)
        mask = additive_mask(input_ids, attention_mask, self.model.dtype, cached=past is not None)
        found = self.model(
            input_ids=input_ids, attention_mask=mask, position_ids=position_ids,
            **cache_argument(self.model, cache), use_cache=past is not None,
        )  # fmt: skip
        layer = None if cache is None else cache.layers[self.index]
        present = () if layer is None else (layer.keys, layer.values)
        return (found.logits.float(), *present, *self.read, self.made[0])


def _write_constants(model: PreTrainedModel) -> dict[float, tuple[str, tuple[int, ...]]]:
    """Fill every parameter with a number of its own; returns its name and shape by that number."""
    constants: dict[float, tuple[str, tuple[int, ...]]] = {}
    for name, parameter in model.named_parameters():
        number = _FIRST + _STEP * len(constants)
        constants[number] = name, tuple(parameter.shape)
        parameter.data = torch.full(parameter.shape, number, dtype=parameter.dtype)
    if len(constants) > _MOST:
        raise NotLayered("a decoder layer has too many parameters")
    return constants


@contextmanager
def _alone(model: PreTrainedModel, prefix: str, index: int) -> Iterator[None]:
    """Within this context, the model has one of its layers alone."""
    parent, _, name = prefix.rpartition(".")
    owner, layers = model.get_submodule(parent), model.get_submodule(prefix)
    setattr(owner, name, nn.ModuleList([layers[index]]))  # type: ignore[index]
    try:
        yield
    finally:
        setattr(owner, name, layers)


def parameters_of(graph: ir.Model, constants: Mapping[float, tuple[str, tuple[int, ...]]]) -> dict[ir.Value, Parameter]:
    """Which parameter each stored tensor is."""
    found: dict[ir.Value, Parameter] = {}
    shapes = {shape for _, shape in constants.values()}
    for value in graph.graph.initializers.values():
        tensor = value.const_value
        shape = () if tensor is None else tuple(tensor.shape.numpy())
        if tensor is None or not shape or not shapes & {shape, shape[::-1]}:
            continue
        array = tensor.numpy()
        number = float(array.reshape(-1)[0])
        if not np.issubdtype(array.dtype, np.floating) or number in (0, 1) or not (array == array.flat[0]).all():
            continue
        name, wanted = constants.get(number, ("", ()))
        if shape not in (wanted, wanted[::-1]) or not wanted:
            raise NotLayered(f"{value.name} is computed from parameters while the model is traced")
        found[value] = Parameter(name, transposed=_is_transposed(value, shape, wanted))
    return found


def _is_transposed(value: ir.Value, shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a matrix is stored transposed; a square one is, where a product reads it as its second operand."""
    if len(shape) < 2 or shape != shape[::-1]:
        return shape != wanted
    products = [node for node, index in value.uses() if node.op_type == "MatMul" and index == 1]
    gemms = [node for node, _ in value.uses() if node.op_type == "Gemm" and not node.attributes.get_int("transB", 0)]
    return bool(products or gemms)
