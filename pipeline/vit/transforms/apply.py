"""Apply equivalent transforms to a float model, and keep only those that are verified not to change its outputs.

Each transform is applied to a copy of the model, whose outputs on calibration images are compared with those of the
original. If they differ by more than fp32 rounding, the transform is discarded with a note. So in an untested model
family a transform may have no effect, but it cannot reduce accuracy.

Rotations are in `rotate.py`. Centring moves the means of tensors, measured on calibration images, into biases, as a
tensor with a large mean wastes codes of a grid with one scale per tensor.

* Keys: a constant that is added to all keys adds the same value to every logit of a query, which does not change the
  softmax. So the mean can be removed (the smoothing of SageAttention, arXiv 2410.02367).
* Values: attention probabilities sum to one, so a constant in the values reaches the output unchanged, and the mean can
  be moved to the projection's bias. The remaining values have zero mean, so the error is much smaller when rounded
  probabilities no longer sum to one.
* Outputs of norms: the mean is moved into the biases of the linear layers with this input.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from fp8pipe.core.devices import parts_on, to_device
from fp8pipe.models.vision.prepare import vision_outputs
from fp8pipe.models.vision.sources import VisionModel
from fp8pipe.models.vision.structure import VitStructure
from pipeline.vit.config import TransformsConfig
from pipeline.vit.transforms.rotate import NotRotatable, rotate_heads, rotate_residual
from pipeline.vit.transforms.wiring import AttentionWiring, Wiring, read_wiring

# Relative to the largest output. Rounding changes outputs by about 1e-6, an incorrect transform by more than 1e-2.
_TOLERANCE: Final = 1e-4
_BATCH: Final = 32
_CHECKED: Final = 8  # number of images on which outputs are compared


@dataclass(frozen=True, slots=True)
class Transformed:
    """A transformed model, and what was done to it."""

    vision: VisionModel  # the same architecture with other weights
    steps: tuple[str, ...]  # descriptions of the applied transforms
    notes: tuple[str, ...]  # transforms that were not applied, and why


def apply_transforms(
    vision: VisionModel, structure: VitStructure, pixels: Tensor, config: TransformsConfig, seed: int
) -> Transformed:
    """Rotate and centre a copy of a float model, as far as its architecture allows.

    Args:
        vision: the float model; not changed.
        structure: its structure.
        pixels: normalized calibration images `(N, 3, H, W)`, on the host.
        config: determines which transforms are tried.
        seed: seed of the random rotations.
    """
    model, steps, notes = vision.model, [], []
    device = next(model.parameters()).device
    reference = _answers(model, pixels)

    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    changes: tuple[tuple[bool, str, Callable[[nn.Module, Wiring], int]], ...] = (
        (
            config.rotate_residual,
            "rotation of the residual stream",
            lambda m, wiring: rotate_residual(m, structure, wiring, seeded()),
        ),
        (config.rotate_heads, "rotation of heads", lambda m, wiring: rotate_heads(m, wiring, seeded())),
        (config.centre, "centring", lambda m, wiring: centre(m, wiring, parts_on(pixels, _BATCH, device))),
    )
    for wanted, name, change in changes:
        if not wanted:
            continue
        changed = copy.deepcopy(model)
        try:
            done = change(changed, read_wiring(changed, structure))
        except NotRotatable as reason:
            notes.append(f"{name}: left out, {reason}")
            continue
        difference = float((_answers(changed, pixels) - reference).abs().max() / reference.abs().max())
        if done == 0:
            notes.append(f"{name}: left out, no part of this model allows it")
        elif difference > _TOLERANCE:
            notes.append(f"{name}: left out, it would change the outputs by {difference:.1e} of the largest")
        else:
            model = changed
            steps.append(f"{name} ({done} places, answers changed by {difference:.1e})")
    return Transformed(replace(vision, model=model), tuple(steps), tuple(notes))


@torch.no_grad()
def _answers(model: nn.Module, pixels: Tensor) -> Tensor:
    return vision_outputs(model, to_device(pixels[:_CHECKED], next(model.parameters()).device))


@torch.no_grad()
def centre(model: nn.Module, wiring: Wiring, batches: Iterable[Tensor]) -> int:
    """Centre keys, values and outputs of norms wherever biases exist that can absorb the mean.

    Args:
        model: a prepared model in evaluation mode; changed in place.
        wiring: its connections.
        batches: normalized pixels `(N, 3, H, W)`, on the model's device.

    Returns:
        The number of centred tensors.
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
    """Subtract the mean of the keys from their bias; returns whether there is such a bias."""
    bias = None if attention.k is None else _bias(model, attention.k.linear)
    if attention.k is None or bias is None:
        return False
    bias[attention.k.slice] -= means[attention.k.linear][attention.k.slice]
    return True


def _centre_values(model: nn.Module, attention: AttentionWiring, means: dict[str, Tensor]) -> bool:
    """Move the mean of the values from their bias into the projection's; returns whether both biases exist."""
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
    """Add `weight @ inputs` to a linear layer's bias, to compensate that `inputs` is subtracted from the layer's input.

    Args:
        model: changed in place.
        linear: module path of the linear layer.
        inputs: `(in,)` float64.
    """
    layer = model.get_submodule(linear)
    bias, weight = layer.get_parameter("bias"), layer.get_parameter("weight")
    bias.add_((weight.double() @ inputs).to(bias.dtype))


def _means(model: nn.Module, names: set[str], batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """The mean output of each named module over images and tokens, `(features,)` float64."""
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
