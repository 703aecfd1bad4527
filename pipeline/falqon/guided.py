"""Second moments of inputs in which a token counts as much as the loss depends on the layer's output for it.

The merge into NVFP4 rounds a weight such that the layer's output changes as little as possible, but not every change
matters equally. If a weight changes by D, the output for token t changes by D x_t; with g_t the gradient of the loss
for this output, the loss grows in proportion to the sum over tokens of `|g_t|^2 |D x_t|^2`. (This is the second-order
estimate, with the empirical Fisher information in place of the Hessian, and one number for all outputs of a token.)
Therefore the second moments of the inputs become

    H = sum over t of |g_t|^2 x_t x_t^T

Tokens that no answer depends on have no weight, such as the ends of prompts in the last layers. GuidedQuant (arXiv
2505.07004) weights calibration tokens by gradients too, in post-training quantization, with a number for each group of
outputs.

The weights of all layers are a few bytes per token, and one backward pass of each batch gives them. Second moments are
then collected in forward passes, for as many layers at once as memory allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.falqon.final_merge import Inputs
from pipeline.falqon.observed import Losses
from pipeline.finetune.compiled import uncompiled

__all__ = ["TokenWeights", "guided_moments", "token_weights"]

TokenWeights = Mapping[str, Sequence[Tensor]]
_Hook = Callable[[Tensor, Tensor], None]


@torch.enable_grad()
def token_weights(model: nn.Module, names: Sequence[str], losses: Losses) -> TokenWeights:
    """The squared norm of the loss's gradient for each layer's output, for each token.

    Args:
        model: gradients of its parameters are set to None.
        names: module paths of the layers.
        losses: runs the batches and yields the loss of each, with its autograd graph.

    Returns:
        For each layer one tensor `(tokens,)` fp32 for each of its calls, in the order of the calls. Calls whose output
        has no gradient are left out, such as those in which activation checkpointing recomputes a layer.
    """
    slots: dict[str, list[Tensor | None]] = {name: [] for name in names}
    # Of a model without trained parameters, only gradients of activations are computed.
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    handle = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
    try:
        with _hooked(model, {name: partial(_await_gradient, found) for name, found in slots.items()}):
            for loss in losses():
                loss.backward()
                model.zero_grad(set_to_none=True)
    finally:
        handle.remove()
    return {name: [weights for weights in found if weights is not None] for name, found in slots.items()}


def _await_gradient(slots: list[Tensor | None], x: Tensor, output: Tensor) -> None:
    place = len(slots)
    slots.append(None)

    def fill(gradient: Tensor) -> None:
        slots[place] = gradient.detach().float().square().sum(-1).flatten()

    if output.requires_grad:
        output.register_hook(fill)


@torch.no_grad()
def guided_moments(model: nn.Module, weights: Mapping[str, Sequence[Tensor]], inputs: Inputs) -> dict[str, Tensor]:
    """H of each layer, `(in, in)` fp32 by name; a layer that no token reached has no entry.

    Args:
        model: is run on the inputs.
        weights: the weights of the tokens of the same batches, for each layer and call.
        inputs: returns the batches.
    """
    moments: dict[str, Tensor] = {}

    def add(name: str, calls: Iterator[Tensor], x: Tensor, output: Tensor) -> None:
        rows = x.detach().flatten(0, -2).float() * next(calls).sqrt().unsqueeze(1)
        moments[name] = moments[name].addmm_(rows.t(), rows) if name in moments else rows.t() @ rows

    with _hooked(model, {name: partial(add, name, iter(each)) for name, each in weights.items()}):
        for batch in inputs():
            model(**batch, use_cache=False)
    return moments


@contextmanager
def _hooked(model: nn.Module, hooks: Mapping[str, _Hook]) -> Iterator[None]:
    """A context in which each hook is called with input and output of every call of the layer of that name."""

    def call(hook: _Hook, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        hook(args[0], output)

    handles = [model.get_submodule(name).register_forward_hook(partial(call, hook)) for name, hook in hooks.items()]
    try:
        with uncompiled():  # torch.compile would not trace the hooks
            yield
    finally:
        for handle in handles:
            handle.remove()
