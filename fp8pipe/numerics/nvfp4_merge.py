"""Round a weight to NVFP4 so that a layer's output changes as little as possible: codes and block scales together.

Neighbouring E2M1 numbers differ by 25 to 50 %, and what fine-tuning adds to a weight is mostly below one percent of it.
Rounded to nearest, almost all of that is lost. Here the codes Q of a weight T are chosen such that `|| X (Q - T)^T ||`
is small for the layer's inputs X, known by their second moments H = X^T X: the rounding error of each input's weights
is distributed over the weights that are not rounded yet, as in GPTQ (arXiv 2210.17323), so that many small changes of
the same direction add up until a code moves.

The 16 inputs of a block share a scale, so they are rounded in succession, the blocks with the largest moments first.
For every candidate scale the whole block is rounded, with its error feedback, and the scale is kept that adds least to
the error of the output: with U the upper Cholesky factor of the damped H's inverse, rounding column i with the error e
adds `(e / U_ii)^2` if the columns after it compensate the error as well as they can.

Such a greedy choice may be worse than rounding to nearest in single rows. As rows are independent, each is compared
with its nearest rounding, under the H that was given, and the better one is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from fp8pipe.numerics.grids import E4M3
from fp8pipe.numerics.nvfp4 import BLOCK, E2M1_MAX, e2m1_codes, e2m1_round, pack_nibbles
from fp8pipe.numerics.nvfp4_weights import BLOCK_SCALE_CODES, NEAREST, SEARCHED, dequantize_packed, quantize_packed
from fp8pipe.numerics.quantizers import inverse_factor

__all__ = ["Packed", "merge_packed", "output_errors"]

DAMPING: Final = 0.01  # of the mean of H's diagonal, as usual in GPTQ


class Packed(NamedTuple):
    """A weight in NVFP4: codes uint8 `(out, in / 2)`, and block scales float8_e4m3fn `(out, in / 16)`."""

    codes: Tensor
    blocks: Tensor


def output_errors(rounded: Tensor, weight: Tensor, moments: Tensor) -> Tensor:
    """`|| X (rounded - weight)^T ||^2` of each output, `(out,)` fp32.

    Args:
        rounded: `(out, in)` fp32.
        weight: `(out, in)` fp32.
        moments: X^T X, `(in, in)` fp32.
    """
    error = rounded - weight
    return ((error @ moments) * error).sum(1)


def merge_packed(
    weight: Tensor,
    scale: float,
    moments: Tensor,
    *,
    offsets: Sequence[int] = SEARCHED,
    damping: float = DAMPING,
) -> Packed:
    """Codes and block scales of a weight, with a small error of the layer's output.

    Args:
        weight: `(out, in)`, finite, any floating-point dtype; `in` is a multiple of 16.
        scale: the global scale of its group, a power of two (`nvfp4_weights.global_scale`).
        moments: `(in, in)` fp32, X^T X of the layer's inputs up to a constant factor.
        offsets: candidates for block scales, as in `quantize_packed`.
        damping: number added to the diagonal of H, as a fraction of the diagonal's mean.

    Returns:
        Codes and block scales. In no row is the error of the output under H larger than with the nearest codes and
        scales, up to the rounding of fp32 sums.

    Raises:
        ValueError: see `quantize_packed`.
    """
    target = weight.detach().float()
    nearest = Packed(*quantize_packed(target, scale, NEAREST))
    best = _compensated(target, scale, moments, offsets, damping)
    least, error = (output_errors(dequantize_packed(*each, scale), target, moments) for each in (best, nearest))
    better = (error <= least).unsqueeze(1)
    return Packed(torch.where(better, nearest.codes, best.codes), _where(better, nearest.blocks, best.blocks))


def _where(chosen: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """`torch.where` for float8, of which torch has none."""
    return torch.where(chosen, one.view(torch.uint8), other.view(torch.uint8)).view(E4M3.dtype)


def _order(moments: Tensor) -> Tensor:
    """Indices of all inputs, block by block: blocks and the inputs in each by the diagonal of H, largest first."""
    diagonal = moments.diagonal().unflatten(0, (-1, BLOCK))
    inside = torch.argsort(diagonal, dim=1, descending=True, stable=True)
    blocks = torch.argsort(diagonal.sum(1), descending=True, stable=True)
    order: Tensor = (blocks.unsqueeze(1) * BLOCK + inside[blocks]).flatten()
    return order


def _compensated(target: Tensor, scale: float, moments: Tensor, offsets: Sequence[int], damping: float) -> Packed:
    order = _order(moments)
    factor = inverse_factor(moments[order][:, order], damping, 0.0)
    work = target.t()[order].contiguous()  # (in, out), so that the weights of an input are contiguous
    values = torch.empty_like(work)
    blocks = torch.empty(target.shape[0], target.shape[1] // BLOCK, dtype=torch.uint8, device=target.device)
    for start in range(0, len(order), BLOCK):
        stop, place = start + BLOCK, order[start] // BLOCK
        codes = _candidates(work[start:stop], scale, offsets)
        found = _round_block(work[start:stop], codes, scale, factor[start:stop, start:stop])
        values[start:stop], blocks[:, place] = found.units, found.codes
        work[stop:].addmm_(factor[start:stop, stop:].t(), found.errors, alpha=-1.0)
    back = torch.argsort(order)
    return Packed(pack_nibbles(e2m1_codes(values[back].t())), blocks.view(E4M3.dtype))


def _candidates(block: Tensor, scale: float, offsets: Sequence[int]) -> Tensor:
    """Codes of the scales to try for a block `(16, out)`: uint8 `(candidates, out)`."""
    amax = block.abs().amax(0)
    nearest = E4M3.cast(amax / (E2M1_MAX * scale)).view(torch.uint8).int()
    return torch.stack([nearest + offset for offset in offsets]).clamp_(*BLOCK_SCALE_CODES).to(torch.uint8)


class _Rounded(NamedTuple):
    """A block rounded with the best scale of each output."""

    units: Tensor  # E2M1 numbers, fp32 `(16, out)`
    codes: Tensor  # of the block scale, uint8 `(out,)`
    errors: Tensor  # each column's error, divided by the diagonal of the factor: fp32 `(16, out)`


def _round_block(block: Tensor, codes: Tensor, scale: float, factor: Tensor) -> _Rounded:
    """Round a block `(16, out)` with every candidate scale, with error feedback, and keep the best of each output."""
    steps = codes.view(E4M3.dtype).float() * scale  # (candidates, out)
    columns = block.unsqueeze(1).repeat(1, len(codes), 1)  # (16, candidates, out)
    units, errors = torch.empty_like(columns), torch.empty_like(columns)
    for i in range(BLOCK):
        units[i] = e2m1_round(columns[i] / steps)
        errors[i] = (columns[i] - units[i] * steps) / factor[i, i]
        columns[i + 1 :] -= factor[i, i + 1 :, None, None] * errors[i]
    best = errors.square().sum(0).argmin(0, keepdim=True)  # (1, out); of equal ones the first
    chosen = best.expand(BLOCK, 1, -1)
    return _Rounded(units.gather(1, chosen)[:, 0], codes.gather(0, best)[0], errors.gather(1, chosen)[:, 0])
