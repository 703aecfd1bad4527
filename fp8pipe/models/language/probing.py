"""Observes the linear layers of a language model during a forward pass of a few tokens.

The pass shows which linears are called, which of them read the same input tensor, and for which ones the model reads
`.weight` itself. A linear can be replaced by another module only if the model calls it: some models multiply by its
weight in their own code (Mamba's `dt_proj`), and some contain linears that a pass of text never calls. Module names do
not reveal this.

Planning uses a model on the meta device, which has no values. Its linears and embeddings then return zeros of the right
shape without reading a weight, and its other tensors are replaced by zeros on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from fp8pipe.core.errors import ConfigurationError, class_and_first_line

_TOKENS = 2


@dataclass(frozen=True, slots=True)
class Seen:
    """Observations about the given linears during a forward pass.

    Attributes:
        groups: linears grouped by the input tensor that they read, in call order. A linear is in a group of its own, at
            the end, if it was not called, was called more than once, or if the model changes its output in place: the
            outputs of a group may be computed together as slices of one tensor, which must not be modified.
        unusable: linears that cannot be replaced by another module, and for each the reason.
    """

    groups: tuple[tuple[str, ...], ...]
    unusable: dict[str, str]


def watch_pass(model: nn.Module, names: Sequence[str], leaves: Sequence[str]) -> Seen:
    """Run the model on a few tokens and observe the named linears.

    Args:
        model: a transformers model, loaded or on the meta device. On the meta device, all tensors outside `leaves` are
            replaced by zeros on the CPU, in place.
        names: the linears to observe.
        leaves: names of all linears and embeddings.

    Raises:
        ConfigurationError: the model does not run on token ids alone.
    """
    device = next(model.parameters()).device
    if on_paper := device.type == "meta":
        _zeros_for_the_rest(model, frozenset(leaves))
        device = torch.device("cpu")
    readers: list[list[str]] = []
    read: set[str] = set()
    uncalled: set[str] = set()
    for training in (False, True):  # some models bypass the linear only in training mode
        calls: dict[str, int] = dict.fromkeys(names, 0)
        with _mode(model, training), _watched(model, leaves if on_paper else names, calls) as watched:
            _run(model, torch.zeros(1, _TOKENS, dtype=torch.long, device=device))
        read |= watched.read
        uncalled |= {name for name in names if not calls[name]}
        if not training:
            once = {name for name in names if calls[name] == 1} - watched.changed
            readers = [[name for name in group if name in once] for group in watched.readers.values()]
    groups = [tuple(group) for group in readers if group]
    grouped = {name for group in groups for name in group}
    unusable = {name: _why(name in read) for name in names if name in read | uncalled}
    return Seen((*groups, *((name,) for name in names if name not in grouped)), unusable)


def _run(model: nn.Module, tokens: Tensor) -> None:
    try:
        # The pass must not affect the random numbers of the training that follows.
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[tokens.device] if tokens.is_cuda and torch.cuda.is_available() else []),
        ):
            model(input_ids=tokens)
    except Exception as error:  # the model's own code may raise any type
        raise ConfigurationError(
            f"{type(model).__name__} does not run on token ids alone",
            why=class_and_first_line(error),
            fix="give a causal language model, or a multi-modal one whose decoder answers text without images",
        ) from error


@contextmanager
def _mode(model: nn.Module, training: bool) -> Iterator[None]:
    """While active, the model is in training or evaluation mode, without a key/value cache (as in training)."""
    whole = getattr(model, "config", None)
    configs = [] if whole is None else [whole, whole.get_text_config(decoder=True)]
    caches = [(config, config.use_cache) for config in configs if hasattr(config, "use_cache")]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)
        for config, _ in caches:
            config.use_cache = False
        yield
    finally:
        for module, was in modes:
            module.training = was
        for config, was in caches:
            config.use_cache = was


def _why(read: bool) -> str:
    return "the model reads its weight without calling it" if read else "a pass of text does not call it"


@dataclass(frozen=True, slots=True)
class _Watched:
    """Observations during a forward pass.

    Attributes:
        readers: names of the linears that read an input tensor, by the tensor's id and version.
        read: names of the modules whose weight is read outside their own forward.
        alive: the input tensors, kept because ids are unique only while the tensors exist.
        outputs: name, output tensor and its version directly after the forward, for each call.
    """

    readers: dict[tuple[int, int], list[str]] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)
    alive: list[Tensor] = field(default_factory=list)
    outputs: list[tuple[str, Tensor, int]] = field(default_factory=list)

    @property
    def changed(self) -> set[str]:
        """Modules whose output was later changed in place."""
        return {name for name, output, version in self.outputs if output._version != version}


@contextmanager
def _watched(model: nn.Module, names: Sequence[str], calls: dict[str, int]) -> Iterator[_Watched]:
    """While active, observe the modules `names` and count the calls of those that are keys of `calls`, in place."""
    seen = _Watched()
    running: set[str] = set()
    modules = {name: model.get_submodule(name) for name in names}
    kinds = {name: type(module) for name, module in modules.items()}

    def begin(module: nn.Module, args: tuple[Any, ...], name: str) -> None:
        running.add(name)
        if name in calls:
            calls[name] += 1
            if args:
                seen.alive.append(args[0])
                seen.readers.setdefault((id(args[0]), args[0]._version), []).append(name)

    def end(module: nn.Module, args: Any, output: Any, name: str) -> None:
        running.discard(name)
        if isinstance(output, Tensor):
            seen.outputs.append((name, output, output._version))

    handles = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_pre_hook(partial(begin, name=name)))
            handles.append(module.register_forward_hook(partial(end, name=name), always_call=True))
            module.__class__ = _watching(name, kinds[name], running, seen.read)
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        for name, module in modules.items():
            module.__class__ = kinds[name]


def _watching(name: str, kind: type[nn.Module], running: set[str], read: set[str]) -> type[nn.Module]:
    """A subclass of a linear or embedding class that adds `name` to `read` if its weight is read from outside.

    If its weight is on the meta device, its forward returns zeros of the right shape.
    """

    def attribute(self: Any, key: str) -> Any:
        value = kind.__getattr__(self, key)
        if name in running or not isinstance(value, Tensor):
            return value
        if key == "weight":
            read.add(name)
        return _zeros(value)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        if self.weight.device.type != "meta":
            return cast(Tensor, kind.forward(self, *args, **kwargs))
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if issubclass(kind, nn.Embedding):
            return torch.zeros(*first.shape, self.weight.shape[1], dtype=self.weight.dtype)
        return first.new_zeros(*first.shape[:-1], self.weight.shape[0 if issubclass(kind, nn.Linear) else 1])

    return type(kind.__name__, (kind,), {"__getattr__": attribute, "forward": forward})


def _zeros_for_the_rest(model: nn.Module, leaves: frozenset[str]) -> None:
    """Replace every meta tensor outside the modules `leaves` by zeros on the CPU, in place."""
    for name, module in model.named_modules():
        if name in leaves:
            continue
        for key, value in module.named_parameters(recurse=False):
            module.register_parameter(key, nn.Parameter(_zeros(value), requires_grad=False))
        for key, value in module.named_buffers(recurse=False):
            module._buffers[key] = _zeros(value)
        for key, value in list(vars(module).items()):
            if isinstance(value, Tensor):
                setattr(module, key, _zeros(value))


def _zeros(value: Tensor) -> Tensor:
    return torch.zeros(value.shape, dtype=value.dtype) if value.device.type == "meta" else value
