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
from fp8pipe.numerics.kinds import Kind
from fp8pipe.numerics.nvfp4 import BLOCK, BlockScales, e2m1_round
from fp8pipe.numerics.quantizers import weight_limits
from pipeline.vit.student import WeightFormat

_DAMPING: Final = 0.01  # of the mean second moment: keeps channels that never vary from being given anything
_BLOCK: Final = 64
_WORTH_IT: Final = 8  # at this width and above, nearest rounding is near enough


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


def compensate(weight: Tensor, step: Tensor, limits: tuple[int, int], moments: Tensor) -> Tensor:
    """Each weight as it stands when its turn to be rounded comes.

    Args:
        weight: `(out, in)`.
        step: `(out,)` fp32, positive.
        limits: smallest and largest code.
        moments: `(in, in)` second moments of the input.

    Returns:
        `(out, in)` fp32; rounded to the nearest code, it has the compensated codes.
    """
    return _compensate(weight, moments, lambda value, _: torch.round(value / step).clamp_(*limits).mul_(step))


def compensate_blocks(weight: Tensor, scales: BlockScales, moments: Tensor) -> Tensor:
    """`compensate` on the NVFP4 grid of these scales."""

    def rounded(value: Tensor, column: int) -> Tensor:
        step = product[:, column // BLOCK]
        return e2m1_round(value / step).mul_(step)

    product = scales.product
    return _compensate(weight, moments, rounded)


def _compensate(weight: Tensor, moments: Tensor, round_column: Callable[[Tensor, int], Tensor]) -> Tensor:
    order = torch.argsort(moments.diagonal(), descending=True, stable=True)
    places = order.tolist()
    factor = _factor(moments[order][:, order].double())
    work, found = weight.detach().float()[:, order].clone(), torch.empty(weight.shape)
    columns = work.shape[1]
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        errors = torch.zeros(work.shape[0], end - start)
        for column in range(start, end):
            value = work[:, column].clone()
            found[:, column] = value
            rounding = value - round_column(value, places[column])
            errors[:, column - start] = rounding / factor[column, column]
            work[:, column:end] -= errors[:, column - start, None] * factor[column, column:end]
        work[:, end:] -= errors @ factor[start:end, end:]
    back = torch.empty_like(order)
    back[order] = torch.arange(columns)
    return found[:, back]


def _factor(moments: Tensor) -> Tensor:
    """Upper Cholesky factor of the damped inverse, fp32."""
    size = moments.shape[0]
    damped = moments + (_DAMPING * moments.diagonal().mean() + 1e-12) * torch.eye(size, dtype=moments.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


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
        if form is None or form.kind is Kind.E4M3 or form.bits >= _WORTH_IT or site.input_group not in moments:
            continue
        weight, step = model.get_submodule(site.name).get_parameter("weight"), steps[site.name]
        if isinstance(step, BlockScales):
            weight.copy_(compensate_blocks(weight, step, moments[site.input_group]))
        else:
            weight.copy_(compensate(weight, step, weight_limits(form.bits), moments[site.input_group]))
        done += 1
    return done
