"""Centring: means that carry no information for a grid, measured on calibration images and moved into biases.

* A constant added to all keys adds the same to every logit of a query, which softmax does not see (the smoothing of
  SageAttention, arXiv 2410.02367). So keys may lose their mean.
* Probabilities add up to one, so a constant in the values passes unchanged: it moves into the projection's bias. What
  is left has no mean, and probabilities that round to a sum other than one then cost far less.
* The mean of a norm's output moves into the biases of the linears that read it.

Centred tensors waste no codes of a grid with one scale per tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from fp8pipe.models.vision.prepare import vision_outputs
from pipeline.vit.transforms.wiring import AttentionWiring, Wiring


@torch.no_grad()
def centre(model: nn.Module, wiring: Wiring, batches: Iterable[Tensor]) -> int:
    """Centre keys, values and the outputs of norms, in place, wherever a bias can take the mean.

    Args:
        model: prepared, eval mode.
        wiring: of it.
        batches: normalized pixels `(N, 3, H, W)`.

    Returns:
        How many tensors were centred.
    """
    norms = {
        norm: linears
        for norm, linears in wiring.readers.items()
        if linears and all(_bias(model, name) is not None for name in (norm, *linears))
    }
    rows = [r for a in wiring.attentions for r in (a.k, a.v) if r is not None]
    means = _means(model, {*norms, *(r.linear for r in rows)}, batches)
    done = sum(_centre_keys(model, a, means) + _centre_values(model, a, means) for a in wiring.attentions)
    for norm, linears in norms.items():
        bias = model.get_submodule(norm).get_parameter("bias")
        bias.sub_(means[norm])
        for name in linears:
            _add_to_bias(model, name, means[norm])
    return done + len(norms)


def _centre_keys(model: nn.Module, attention: AttentionWiring, means: dict[str, Tensor]) -> bool:
    """Take the mean of the keys out of their bias; whether that was possible."""
    bias = None if attention.k is None else _bias(model, attention.k.linear)
    if attention.k is None or bias is None:
        return False
    bias[attention.k.slice] -= means[attention.k.linear][attention.k.slice]
    return True


def _centre_values(model: nn.Module, attention: AttentionWiring, means: dict[str, Tensor]) -> bool:
    """Move the mean of the values into the projection's bias; whether that was possible."""
    if attention.v is None or attention.projection is None or attention.site.pools:
        return False
    bias, mean = _bias(model, attention.v.linear), means[attention.v.linear][attention.v.slice]
    if bias is None or _bias(model, attention.projection) is None:
        return False
    bias[attention.v.slice] -= mean
    _add_to_bias(model, attention.projection, mean)
    return True


def _bias(model: nn.Module, name: str) -> nn.Parameter | None:
    return getattr(model.get_submodule(name), "bias", None)


def _add_to_bias(model: nn.Module, linear: str, inputs: Tensor) -> None:
    """Let a linear give what it gave before this constant was taken from its inputs."""
    layer = model.get_submodule(linear)
    bias, weight = layer.get_parameter("bias"), layer.get_parameter("weight")
    bias.add_((weight.double() @ inputs).to(bias.dtype))


def _means(model: nn.Module, names: set[str], batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Mean output of each module over images and tokens, float64."""
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(names, 0)

    def add(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        rows = output.flatten(0, -2).double()
        sums[name] = sums[name] + rows.sum(0) if name in sums else rows.sum(0)
        counts[name] += rows.shape[0]

    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(model.get_submodule(name).register_forward_hook(partial(add, name)))
        for pixels in batches:
            vision_outputs(model, pixels)
    return {name: sums[name] / counts[name] for name in names}
