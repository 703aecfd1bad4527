"""Observe the input and the output gradient of each linear layer in backward passes; each pair is freed after use.

Before conversion a model takes twice the memory, so there may be no room for its activations. Decoder layers therefore
run with activation checkpointing here, even if training does not use it. (transformers supports it only in training
mode, but the model is in evaluation mode here, without dropout.) Inputs are observed when a decoder layer is
recomputed, just before its backward pass. The results are bit-identical to those without checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.compat import import_transformers
from pipeline.falqon.sums import Sums

Losses = Callable[[], Iterable[Tensor]]
_Project = Callable[[Tensor, Tensor, str], Tensor]
_CACHES = ("cache", "past_key_values", "layer_past")  # arguments of decoder layers


@dataclass(slots=True)
class _Cell:
    """Collects the input and the output gradient of one call of a layer, in either order.

    As soon as both are there, `project` is called with them and they are freed.
    """

    project: Callable[[Tensor, Tensor], None]
    x: Tensor | None = None
    gradient: Tensor | None = None

    def meet(self) -> None:
        if self.x is not None and self.gradient is not None:
            self.project(self.x, self.gradient)
            self.x = self.gradient = None


@dataclass(slots=True)
class _Repeated:
    """State of the decoder layer that is running under checkpointing, if any.

    Attributes:
        cells: the cells of the linear layers called in its first run, in call order; None outside such a layer.
        again: iterates over these cells while the layer is recomputed; None in the first run.
    """

    cells: list[_Cell] | None = None
    again: Iterator[_Cell] | None = None


@dataclass(slots=True)
class _Run:
    """One run of a checkpointed layer: called in the forward pass, and again for recomputation in the backward pass."""

    forward: Callable[..., Any]
    state: _Repeated
    cells: list[_Cell] = field(default_factory=list)
    repeated: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = self.state.cells, self.state.again
        self.state.cells, self.state.again = self.cells, iter(self.cells) if self.repeated else None
        self.repeated = True
        try:
            return self.forward(*args, **kwargs)
        finally:
            self.state.cells, self.state.again = before


def observe(model: nn.Module, names: Sequence[str], losses: Losses, project: _Project, sums: Sums) -> None:
    """Compute `project(X, G, name)` for each linear layer, summed over all batches.

    Args:
        model: unchanged on return.
        names: module paths of the layers.
        losses: runs the batches and yields the loss of each, with its autograd graph.
        project: called with a layer's input X `(tokens, in)`, the gradient G of its output `(tokens, out)` and its
            module path.
        sums: receives the sums, by module path.

    Raises:
        ConfigurationError: no token of the batches reached some layer.
    """
    state = _Repeated()

    def add(name: str, x: Tensor, gradient: Tensor) -> None:
        sums.add(name, project(x, gradient, name))

    def on_forward(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0].detach().reshape(-1, args[0].shape[-1])
        if state.again is not None:  # recomputation: the gradient hook is on the first run's output; use its cell
            cell = next(state.again)
            cell.x = x
            cell.meet()
            return
        cell = _Cell(partial(add, name), None if state.cells is not None else x)
        if state.cells is not None:
            state.cells.append(cell)

        def on_gradient(gradient: Tensor) -> None:
            cell.gradient = gradient.reshape(-1, gradient.shape[-1])
            cell.meet()

        output.register_hook(on_gradient)

    handles = [model.get_submodule(name).register_forward_hook(partial(on_forward, name)) for name in names]
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    handles.append(embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_()))
    try:
        with _checkpointed(model, state):
            for loss in losses():
                loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    if silent := [name for name in names if name not in sums]:
        raise ConfigurationError(
            f"{len(silent)} layer(s) have no gradient to start from",
            why=f"the first: no token of the first training batches went through {silent[0]}",
            fix="give more `gradient_batches` in the configuration, or use --initialisation randomized-svd",
        )


@contextmanager
def _checkpointed(model: nn.Module, state: _Repeated) -> Iterator[None]:
    """A context in which the layers that support activation checkpointing use it, in evaluation mode, too."""
    layers = _outermost(model)

    def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if any(kwargs.get(name) is not None for name in _CACHES):  # recomputation would write to the cache twice
            return forward(*args, **kwargs)
        return checkpoint(_Run(forward, state), *args, use_reentrant=False, **kwargs)

    try:
        for layer in layers:
            layer.forward = partial(run, layer.forward)
        with set_checkpoint_early_stop(False):  # so that recomputation reaches the last linear layer of each layer
            yield
    finally:
        for layer in layers:
            del layer.forward


def _outermost(model: nn.Module) -> list[nn.Module]:
    """The layers that support checkpointing and are not nested in another such layer."""
    import_transformers()
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():  # parents come before their children
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, GradientCheckpointingLayer) and not inside:
            found[name] = module
    return list(found.values())
