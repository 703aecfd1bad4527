"""Weights prepared for rounding: refitted to rounded inputs, and with the errors of their own rounding compensated.

Inputs of few bits have large rounding errors, and these are not independent of the values: probabilities that are
rounded to zero, for instance, always take something away from the output. What is a linear function of the rounded
input is removed: each weight is replaced by the one that gives the original outputs with the smallest squared error
from rounded inputs (ridge regression, as in ERQ, ICML 2024), and the mean of the remaining error moves into the bias.
The inputs of an attention's projection are those with all operands of the attention rounded.

Weights are then rounded with error compensation (GPTQ, arXiv 2210.17323): columns are rounded one after the other, and
the error of each is compensated in the columns that are not yet rounded, by Optimal Brain Surgeon's update with the
second moments of the layer's rounded inputs. The functions here return each weight with all compensations, as it was
just before it was rounded. Rounding it to nearest gives the compensated codes; and a student that starts from these
unrounded values retains how close each of them is to the next code.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from fp8pipe.models.vision.attention import explicit_attention, intercept_attention
from fp8pipe.models.vision.prepare import vision_outputs
from fp8pipe.models.vision.quantized import Quantizer
from fp8pipe.models.vision.sources import VisionModel
from fp8pipe.models.vision.structure import VitStructure
from fp8pipe.numerics.kinds import Kind
from fp8pipe.numerics.nvfp4 import BlockScales, e2m1_round
from fp8pipe.numerics.quantizers import compensated_round, nearest_codes, weight_limits
from pipeline.vit.student import WeightFormat
from pipeline.vit.transforms.wiring import read_wiring

# Relative to the mean second moment; prevents errors from being moved to input channels that never vary.
_DAMPING: Final = 0.01
_COLUMNS: Final = 64  # columns per block in GPTQ's solver
_NEAREST_FROM_BITS: Final = 8  # from this bit width on, round-to-nearest is accurate enough


@dataclass(slots=True)
class InputMoments:
    """Moments of the inputs x of a group of linear layers, and of the same inputs rounded, x'; `(in, in)`, `(in,)`."""

    rounded: Tensor  # mean of x' x'^T, fp32
    cross: Tensor  # mean of x x'^T
    mean: Tensor  # mean of x
    rounded_mean: Tensor  # mean of x'

    def add(self, other: InputMoments) -> None:
        """Add other moments (of sums, before they are divided by their count), in place."""
        for name in self.__slots__:
            getattr(self, name).add_(getattr(other, name))

    def divide(self, count: int) -> None:
        """Divide sums by the number of inputs, in place."""
        for name in self.__slots__:
            getattr(self, name).div_(count)


def input_moments(
    vision: VisionModel,
    structure: VitStructure,
    activations: Mapping[str, Quantizer],
    batches: Iterable[Tensor],
) -> dict[str, InputMoments]:
    """Moments of the inputs of linear layers, as they are and rounded, measured on the float model.

    Args:
        vision: the float model.
        structure: its structure.
        activations: quantizers by activation site; other sites are not rounded.
        batches: normalized pixels `(N, 3, H, W)`, on the model's device.

    Returns:
        The moments for each group of linear layers with the same input, without the patch embedding.
    """
    sums: dict[str, InputMoments] = {}
    counts = dict.fromkeys((site.input_group for site in structure.linears if site.kind == "linear"), 0)
    attentions = _by_projection(vision.model, structure)
    outputs: dict[str, Tensor] = {}

    def attend(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        def fake(what: str, x: Tensor) -> Tensor:
            quantizer = activations.get(f"{name}.{what}")
            return x if quantizer is None else quantizer.fake(x)

        output = explicit_attention(
            fake("q", q * scale if scale != 1.0 else q), fake("k", k), fake("v", v), mask, 1.0,
            on_probs=lambda probs: fake("probs", probs),
        )  # fmt: skip
        outputs[name] = output.transpose(1, 2).flatten(2).flatten(0, 1)
        return explicit_attention(q, k, v, mask, scale)

    def note(group: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows, quantizer = args[0].flatten(0, -2).float(), activations.get(f"{group}.input")
        rounded = outputs.pop(attentions[group]).float() if group in attentions else rows
        rounded = rounded if quantizer is None else quantizer.fake(rounded)
        these = InputMoments(rounded.T @ rounded, rows.T @ rounded, rows.sum(0), rounded.sum(0))
        if group in sums:
            sums[group].add(these)
        else:
            sums[group] = these
        counts[group] += rows.shape[0]

    with ExitStack() as hooks, torch.no_grad():
        for group in counts:
            hooks.enter_context(vision.model.get_submodule(group).register_forward_pre_hook(partial(note, group)))
        hooks.enter_context(intercept_attention(vision.model, structure.attention_names, attend))
        for pixels in batches:
            vision_outputs(vision.model, pixels)
    for group, found in sums.items():
        found.divide(counts[group])
    return sums


def _by_projection(model: nn.Module, structure: VitStructure) -> dict[str, str]:
    """The attention before each linear layer that reads the output of exactly one, with all heads concatenated."""
    found = [(a.projection, a.site.name) for a in read_wiring(model, structure).attentions if a.projection]
    readers = [projection for projection, _ in found]
    return {projection: name for projection, name in found if readers.count(projection) == 1}


@torch.no_grad()
def refit(layer: nn.Module, moments: InputMoments) -> None:
    """Replace the weight of a linear layer, and its bias, so that rounded inputs give nearly the original outputs.

    The new weight minimizes the mean of `|| W' x' + b' - W x - b ||^2` plus a small multiple of `|| W' - W ||^2`.

    Args:
        layer: a linear layer `(out, in)`, with or without a bias; changed in place.
        moments: moments of its inputs.
    """
    weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
    second, error = moments.rounded.double(), (moments.cross - moments.rounded).double()
    if bias is not None:  # the means are left to the bias
        second -= torch.outer(moments.rounded_mean, moments.rounded_mean).double()
        error -= torch.outer(moments.mean - moments.rounded_mean, moments.rounded_mean).double()
    second.diagonal().add_(_DAMPING * second.diagonal().mean().clamp(min=1e-12))
    change = torch.cholesky_solve((weight.double() @ error).T, torch.linalg.cholesky(second)).T
    before = weight.clone()
    weight.add_(change.float())
    if bias is not None:
        bias.add_(before @ moments.mean - weight @ moments.rounded_mean)


def refit_model(
    model: nn.Module, structure: VitStructure, formats: Mapping[str, WeightFormat], moments: Mapping[str, InputMoments]
) -> int:
    """Refit the integer weights of fewer than 8 bits to their rounded inputs, in place; see `refit`.

    Returns:
        The number of changed layers.
    """
    done = 0
    for site in structure.linears:
        form = formats.get(site.name)
        if form is None or form.kind is not Kind.INT or form.bits >= _NEAREST_FROM_BITS:
            continue
        if site.input_group in moments:
            refit(model.get_submodule(site.name), moments[site.input_group])
            done += 1
    return done


def compensate(weight: Tensor, step: Tensor | BlockScales, bits: int, moments: Tensor) -> Tensor:
    """A weight matrix with the rounding errors of earlier columns compensated in later ones, not yet rounded.

    Args:
        weight: `(out, in)`.
        step: positive scales `(out,)` fp32 of integer codes, or the block scales of NVFP4.
        bits: bit width of integer codes.
        moments: `(in, in)` second moments of the input.

    Returns:
        `(out, in)` fp32; rounding to nearest gives the compensated codes.
    """
    scales = step.product if isinstance(step, BlockScales) else step.unsqueeze(1)
    width = weight.shape[1] // scales.shape[1]  # columns that share a scale

    def round_column(value: Tensor, column: int) -> Tensor:
        scale = scales[:, column // width]
        units = value / scale
        rounded = e2m1_round(units) if isinstance(step, BlockScales) else nearest_codes(units, *weight_limits(bits))
        return rounded.mul_(scale)

    return compensated_round(
        weight, moments, round_column, block=_COLUMNS, damping=_DAMPING, damping_floor=1e-12, fused=False
    ).before


@torch.no_grad()
def compensate_model(
    model: nn.Module,
    structure: VitStructure,
    formats: Mapping[str, WeightFormat],
    steps: Mapping[str, Tensor | BlockScales],
    moments: Mapping[str, InputMoments],
) -> int:
    """Replace the weights of linear layers of fewer than 8 bits with those of `compensate`, in place.

    Args:
        model: the float model; changed in place.
        structure: its structure.
        formats: weight formats by layer.
        steps: weight scales by layer.
        moments: moments by input group.

    Returns:
        The number of changed layers.
    """
    done = 0
    for site in structure.linears:
        form = formats.get(site.name)
        if form is None or form.kind is Kind.E4M3 or form.bits >= _NEAREST_FROM_BITS or site.input_group not in moments:
            continue
        weight, step = model.get_submodule(site.name).get_parameter("weight"), steps[site.name]
        weight.copy_(compensate(weight, step, form.bits, moments[site.input_group].rounded))
        done += 1
    return done
