"""Runs a language model in torch with the weights of one decoder layer at a time.

transformers builds the model as usual, except that every tensor of a decoder layer is one zero, expanded to the
tensor's shape. A layer gets its numbers before it runs and loses them afterwards. All texts pass through a layer before
the next one is read, so that each weight is read and dequantized once per run; what passes from layer to layer is kept.

That is the model's own computation only if every layer reads the output of the layer before, and nothing else that a
layer has computed. `open_stream` finds out by a pass of a few tokens, in which the outputs of all layers ask for
gradients: an argument that depends on one asks for them, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from exporters.tensorrt.language.source import LanguageModel
from fp8pipe.models.language.structure import build_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROBE: Final = 3  # tokens of the pass that asks how layers are connected


class NotLayered(Exception):
    """Why a model cannot be run or traced layer by layer."""


class _Stop(Exception):
    """Ends a forward pass after the last layer's arguments are known."""


@dataclass(slots=True)
class _Call:
    """One call of a layer, without its first argument."""

    rest: tuple[Any, ...]
    named: dict[str, Any]


@dataclass(frozen=True, slots=True)
class LayerStream:
    """A model whose decoder layers hold numbers only while they run."""

    source: LanguageModel
    model: PreTrainedModel  # in evaluation mode
    prefix: str  # name of the list of decoder layers, for example "model.layers"
    in_tuple: bool = False  # whether layers return their output in a tuple
    # called once all texts ran through a layer: its number, what it read and what it returned for each text
    after: list[Callable[[int, list[Tensor], list[Tensor]], None]] = field(default_factory=list)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        found = self.model.get_submodule(self.prefix)
        assert isinstance(found, nn.ModuleList)
        return found

    @contextmanager
    def loaded(self, index: int) -> Iterator[nn.Module]:
        """Within this context, a layer has its weights."""
        layer, place = self.layers[index], f"{self.prefix}.{index}."
        tensors = [*layer.named_parameters(), *layer.named_buffers()]
        thin = {name: tensor.data for name, tensor in tensors}
        read = layer_tensors(self.source, place)
        try:
            for name, tensor in tensors:
                if name in read:
                    tensor.data = read[name]().to(tensor.dtype)
            yield layer
        finally:
            for name, tensor in tensors:
                tensor.data = thin[name]

    @torch.no_grad()
    def run(self, texts: Sequence[Tensor], *, head: bool = True) -> Iterator[Tensor]:
        """Logits `(batch, tokens, vocabulary)` for each of `texts` `(batch, tokens)`, int64; none without `head`."""
        begun = [self._begin(ids) for ids in texts]
        states, calls = [state for state, _ in begun], [call for _, call in begun]
        for index in range(len(self.layers)):
            read, states = states, []
            with self.loaded(index) as layer:
                for state, call in zip(read, calls, strict=True):
                    made = layer(state, *call[index].rest, **call[index].named)
                    states.append(made if isinstance(made, Tensor) else made[0])
            for function in self.after:
                function(index, read, states)
        for ids, state in zip(texts, states, strict=True) if head else ():
            yield self._end(ids, state)

    def _begin(self, ids: Tensor) -> tuple[Tensor, list[_Call]]:
        """What the first layer reads, and how every layer is called."""
        calls: list[_Call] = []
        first: list[Tensor] = []

        def layer(index: int, hidden: Tensor, *rest: Any, **named: Any) -> Any:
            first.append(hidden)
            calls.append(_Call(rest, named))
            if index + 1 == len(self.layers):
                raise _Stop
            return self.as_output(hidden)

        with self.replaced(layer), suppress(_Stop):
            self.model(input_ids=ids, use_cache=False)
        return first[0], calls

    def _end(self, ids: Tensor, state: Tensor) -> Tensor:
        """The logits that follow from the last layer's output."""
        with self.replaced(lambda *given, **named: self.as_output(state)):
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    def as_output(self, hidden: Tensor) -> Any:
        """What a layer returns whose output is `hidden`."""
        return (hidden,) if self.in_tuple else hidden

    @contextmanager
    def replaced(self, function: Callable[..., Any]) -> Iterator[None]:
        """Within this context, `function` is called in place of every layer, with its number before its arguments."""
        with ExitStack() as undo:
            for index, layer in enumerate(self.layers):
                layer.forward = partial(function, index)
                undo.callback(layer.__dict__.pop, "forward")
            yield


def layer_tensors(source: LanguageModel, place: str) -> dict[str, Callable[[], Tensor]]:
    """What reads the tensors whose names in the model begin with `place`, by the rest of their names, in fp32."""
    read: dict[str, Callable[[], Tensor]] = {}
    for module in source.weights:
        if module.startswith(place):
            read[f"{module.removeprefix(place)}.weight"] = partial(_dequantized, source, module)
    for name in source.floats:
        known = source.plan.names[name].name
        if known.startswith(place):
            read[known.removeprefix(place)] = partial(source.floats.__getitem__, name)
    return read


def _dequantized(source: LanguageModel, module: str) -> Tensor:
    return source.weights[module].dequantize()


def open_stream(source: LanguageModel, dtype: torch.dtype) -> LayerStream:
    """The model of an artifact, without the weights of its decoder layers.

    Raises:
        NotLayered: the model has to be run as a whole.
    """
    model = thin_model(source, dtype, prefix := layer_list(source))
    stream = LayerStream(source, model, prefix)
    with stream.loaded(0), torch.no_grad():
        found: list[Any] = []
        handle = stream.layers[0].register_forward_hook(lambda module, given, made: found.append(made))
        try:
            model(input_ids=torch.zeros(1, _PROBE, dtype=torch.int64), use_cache=False)
        finally:
            handle.remove()
    (made,) = found
    if not isinstance(made, Tensor) and (not isinstance(made, tuple) or len(made) != 1):
        raise NotLayered("a decoder layer returns more than its output")
    stream = replace(stream, in_tuple=not isinstance(made, Tensor))
    check_chain(stream)
    return stream


def layer_list(source: LanguageModel) -> str:
    """The name of the list of decoder layers.

    Raises:
        NotLayered: a quantized linear belongs to none, or there are several such lists.
    """
    places = {name[:match] for name in source.weights if (match := _number(name)) > 0}
    outside = [name for name in source.weights if _number(name) < 0]
    if outside or len(places) != 1:
        raise NotLayered(f"{outside[0]} lies outside of the decoder layers" if outside else "several lists of layers")
    if broken := [name for name, known in source.plan.names.items() if not known.whole]:
        raise NotLayered(f"transformers computes a tensor from {broken[0]} and others")
    return places.pop()


def _number(name: str) -> int:
    """The length of what precedes the first number in a module's name; -1 if there is none."""
    parts = name.split(".")
    first = next((index for index, part in enumerate(parts) if part.isdecimal()), 0)
    return len(".".join(parts[:first])) if first else -1


def thin_model(source: LanguageModel, dtype: torch.dtype, prefix: str) -> PreTrainedModel:
    """The transformers model in evaluation mode; the tensors of its decoder layers are zeros that take no memory."""
    state: dict[str, Tensor] = {}
    for unit in source.plan.units:
        name = unit.entry.name
        if source.plan.names[name].name.startswith(f"{prefix}."):
            state[name] = torch.zeros((), dtype=dtype).expand(unit.entry.shape)
        else:
            state[name] = source.floats[name].to(dtype)
    return build_model(source.root, state, dtype, attn_implementation="eager")


def check_chain(stream: LayerStream) -> None:
    """Refuse models in which a layer reads more of earlier layers than the output of the one before."""
    made: list[Tensor] = []
    read: list[tuple[int, Tensor, _Call]] = []

    def layer(index: int, *given: Any, **named: Any) -> Any:
        if not given or not isinstance(given[0], Tensor):
            raise NotLayered("a decoder layer does not get its input as its first argument")
        read.append((index, given[0], _Call(given[1:], named)))
        made.append(torch.zeros_like(given[0]).requires_grad_())
        return stream.as_output(made[-1])

    for parameter in stream.model.parameters():
        parameter.requires_grad_(False)
    with stream.replaced(layer), torch.enable_grad():
        stream.model(input_ids=torch.zeros(1, _PROBE, dtype=torch.int64), use_cache=False)
    if [index for index, _, _ in read] != list(range(len(stream.layers))):
        raise NotLayered("decoder layers are not called one after the other, once each")
    if not all(hidden is output for output, (_, hidden, _) in zip(made, read[1:], strict=False)):
        raise NotLayered("a decoder layer reads something else than the output of the one before")
    if any(tensor.requires_grad for _, _, call in read for tensor in tensors_in((call.rest, call.named))):
        raise NotLayered("an argument of a decoder layer depends on earlier layers")


def tensors_in(given: Any) -> Iterable[Tensor]:
    """All tensors in nested tuples, lists and dictionaries."""
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, dict):
        for value in given.values():
            yield from tensors_in(value)
    elif isinstance(given, list | tuple):
        for value in given:
            yield from tensors_in(value)
