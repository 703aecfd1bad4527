"""Inputs and output gradients of a model's linear layers, while it runs backward: of each layer together, then dropped.

The unconverted model takes twice the memory of the one that trains, so its activations must not be held beside it:
decoder layers are checkpointed here, though training may not do that (transformers would do it in training mode alone,
and the model is in evaluation mode, for dropout must not disturb what is observed). Their inputs are then seen when a
layer is repeated, just before its backward pass. No bit depends on it.
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
_CACHES = ("past_key_values", "layer_past")  # arguments of decoder layers


@dataclass(slots=True)
class _Cell:
    """Where a layer's input and the gradient of its output meet, in any order, and are used up."""

    project: Callable[[Tensor, Tensor], None]
    x: Tensor | None = None
    gradient: Tensor | None = None

    def meet(self) -> None:
        if self.x is not None and self.gradient is not None:
            self.project(self.x, self.gradient)
            self.x = self.gradient = None


@dataclass(slots=True)
class _Repeated:
    """The run of a checkpointed layer that is going on, if any: its cells in call order, empty until it is repeated."""

    cells: list[_Cell] | None = None
    again: Iterator[_Cell] | None = None


@dataclass(slots=True)
class _Run:
    """One run of a checkpointed layer, which is called a second time when its gradients are due."""

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
    """Add up `project(X, G, name)` of each linear layer over all batches.

    Args:
        model: left as it was found.
        names: module paths of the layers.
        losses: runs the batches, yielding each one's loss with gradient.
        project: of a layer's input `(tokens, in)`, the gradient of its output `(tokens, out)`, and its path.
        sums: takes the sums, by path.

    Raises:
        ConfigurationError: a layer that no token of the batches reached.
    """
    state = _Repeated()

    def add(name: str, x: Tensor, gradient: Tensor) -> None:
        sums.add(name, project(x, gradient, name))

    def on_forward(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0].detach().reshape(-1, args[0].shape[-1])
        if state.again is not None:  # its first output waits for a gradient, or has got it
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
    """While active, the layers that transformers can checkpoint are checkpointed, in any mode."""
    layers = _outermost(model)

    def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if any(kwargs.get(name) is not None for name in _CACHES):  # a repetition would write it once more
            return forward(*args, **kwargs)
        return checkpoint(_Run(forward, state), *args, use_reentrant=False, **kwargs)

    try:
        for layer in layers:
            layer.forward = partial(run, layer.forward)
        with set_checkpoint_early_stop(False):  # each layer's last linear must be called again, too
            yield
    finally:
        for layer in layers:
            del layer.forward


def _outermost(model: nn.Module) -> list[nn.Module]:
    """Layers that can be checkpointed and lie in no other such layer."""
    import_transformers()
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():  # a module comes before those in it
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, GradientCheckpointingLayer) and not inside:
            found[name] = module
    return list(found.values())
