"""Rounding that makes up for itself: the columns of a weight still to come take up the error of those already rounded.

Optimal Brain Surgeon's update with the layer's own second moments, column by column (GPTQ, arXiv 2210.17323). The
moments come from the inputs as the deployed layer will read them: on the grid of its activation. What is returned is
each weight as it stood just before its rounding. Rounding it to the nearest code gives the compensated codes, and a
student that starts from it still knows how near each weight is to the next code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

import torch
from torch import Tensor, nn

from fp8pipe.models.vision.prepare import vision_outputs
from fp8pipe.models.vision.quantized import Quantizer
from fp8pipe.models.vision.sources import VisionModel
from fp8pipe.models.vision.structure import VitStructure
from fp8pipe.numerics.compensated import compensated_round
from fp8pipe.numerics.kinds import Kind
from fp8pipe.numerics.nvfp4 import BlockScales, e2m1_round
from fp8pipe.numerics.quantizers import nearest_codes, weight_limits
from pipeline.vit.student import WeightFormat

_DAMPING: Final = 0.01  # of the mean second moment: keeps channels that never vary from being given anything
_COLUMNS: Final = 64  # of a block of the solver
_NEAREST_FROM_BITS: Final = 8  # at this width and above, nearest rounding is near enough


def second_moments(
    vision: VisionModel,
    structure: VitStructure,
    activations: Mapping[str, Quantizer],
    batches: Iterable[Tensor],
) -> dict[str, Tensor]:
    """Mean outer product `(in, in)` fp32 of what each group of linears reads, after its quantizer.

    Args:
        vision: the float model.
        structure: of it.
        activations: by site.
        batches: normalized pixels `(N, 3, H, W)`.

    Returns:
        By input group, without the patch embedding.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def noting(group: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        quantizer = activations.get(f"{group}.input")

        def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].flatten(0, -2).float()
            rows = rows if quantizer is None else quantizer.fake(rows)
            product = rows.T @ rows
            sums[group] = product if group not in sums else sums[group].add_(product)
            counts[group] = counts.get(group, 0) + rows.shape[0]

        return note

    groups = dict.fromkeys(site.input_group for site in structure.linears if site.kind == "linear")
    handles = [vision.model.get_submodule(g).register_forward_pre_hook(noting(g)) for g in groups]
    try:
        with torch.no_grad():
            for pixels in batches:
                vision_outputs(vision.model, pixels)
    finally:
        for handle in handles:
            handle.remove()
    return {group: sums[group] / counts[group] for group in groups}


def compensate(weight: Tensor, step: Tensor | BlockScales, bits: int, moments: Tensor) -> Tensor:
    """Each weight as it stands when its turn to be rounded comes.

    Args:
        weight: `(out, in)`.
        step: `(out,)` fp32, positive, of integer codes; or the scales of NVFP4.
        bits: of integer codes.
        moments: `(in, in)` second moments of the input.

    Returns:
        `(out, in)` fp32; rounded to the nearest code, it has the compensated codes.
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
    moments: Mapping[str, Tensor],
) -> int:
    """Replace the weights of all linears below 8 bits by `compensate`'s, in place; how many there were."""
    done = 0
    for site in structure.linears:
        form = formats.get(site.name)
        if form is None or form.kind is Kind.E4M3 or form.bits >= _NEAREST_FROM_BITS or site.input_group not in moments:
            continue
        weight, step = model.get_submodule(site.name).get_parameter("weight"), steps[site.name]
        weight.copy_(compensate(weight, step, form.bits, moments[site.input_group]))
        done += 1
    return done
