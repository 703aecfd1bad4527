"""NVFP4 as checkpoints of language models store it: packed codes, scales of blocks, and one scale per fused group.

`value = code * block_scale * global_scale`. A code is E2M1, two of them in a byte, the first in the low half; a block
scale is E4M3 and shared by 16 consecutive inputs of a row. The global scale is shared by all layers that an engine
concatenates (q/k/v, gate/up): vLLM multiplies all parts by one of their global scales, so with unequal ones it serves
other weights than those in the file, and only warns.

Two restrictions make the product exact in every engine, whatever it multiplies first and in which dtype:

* The global scale is a power of two. A code has 2 significant bits and a block scale 4, so that a value has at most 6,
  and bf16 has 8. With the limits below, no value is near the ends of bf16's range, and neither is the global scale
  after vLLM's Marlin kernel has multiplied it by 2^119.
* Block scales are normal E4M3 numbers, from 2^-6 to 448. Marlin converts them to a format without subnormal numbers,
  and replaces smaller scales by zero. The cost is negligible: such a block is below a seven-thousandth of the group's
  amax.

The scale of a block is the best of five candidates (`SEARCHED`), by squared error: the E4M3 number nearest to amax / 6,
and some others. A block whose largest weight is mapped to 4 instead of 6 uses the part of the grid with the smaller
steps. The squared error of a block is summed in a fixed order, so that every device and every implementation chooses
the same scale. The nearest number alone (`NEAREST`) is what others round with; a benchmark compares the two, and
`docs/vllm.md` has the losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from fp8pipe.numerics.grids import E4M3
from fp8pipe.numerics.nvfp4 import (
    BLOCK,
    E2M1_MAX,
    e2m1_codes,
    e2m1_round,
    e2m1_values,
    pack_nibbles,
    unpack_nibbles,
)

__all__ = [
    "LARGEST_GLOBAL_SCALE", "NEAREST", "SEARCHED", "SMALLEST_BLOCK_SCALE", "SMALLEST_GLOBAL_SCALE",
    "dequantize_packed", "global_scale", "quantize_packed",
]  # fmt: skip

SMALLEST_BLOCK_SCALE: Final = 2.0**-6  # the smallest normal E4M3 number
SMALLEST_GLOBAL_SCALE: Final = 2.0**-18
LARGEST_GLOBAL_SCALE: Final = 2.0**8
# Candidates for a block scale, as offsets from the E4M3 code of amax / 6. Eight codes are a factor of two. On Gaussian
# weights the five reduce the root mean square error from 9.5 % to 8.2 %, and so do the fifteen from -7 to 7 (8.1 %).
NEAREST: Final = (0,)
SEARCHED: Final = (0, -1, 1, 4, 5)
_HEADROOM: Final = 2.0  # the largest candidate is less than twice the nearest one
BLOCK_SCALE_CODES: Final = (0x08, 0x7E)  # of the smallest and the largest block scale, 2^-6 and 448


def global_scale(amax: float) -> float:
    """The global scale of a group of weights: the smallest power of two that leaves room for every candidate scale.

    Args:
        amax: largest magnitude of all weights in the group.

    Raises:
        ValueError: it is negative, not finite, or too large for `LARGEST_GLOBAL_SCALE` (above 344,064).
    """
    largest = E2M1_MAX * E4M3.max / _HEADROOM
    if not 0 <= amax <= largest * LARGEST_GLOBAL_SCALE:
        raise ValueError(f"weights reach {amax:g}; NVFP4 holds finite ones up to {largest * LARGEST_GLOBAL_SCALE:g}")
    exponent = math.frexp(amax / largest)
    scale = math.ldexp(1.0, exponent[1] - (exponent[0] == 0.5))
    return max(scale, SMALLEST_GLOBAL_SCALE) if amax else SMALLEST_GLOBAL_SCALE


def quantize_packed(weight: Tensor, scale: float, offsets: Sequence[int] = SEARCHED) -> tuple[Tensor, Tensor]:
    """Round a weight to the nearest codes, ties to even.

    Args:
        weight: `(out, in)`, finite, any floating-point dtype; `in` is a multiple of 16. Rows are independent, so a
            weight may be taken apart between any two.
        scale: the global scale of its group, see `global_scale`.
        offsets: candidates for block scales, `SEARCHED` or `NEAREST`; of several equally good ones, the first.

    Returns:
        Codes, uint8 `(out, in / 2)`, and block scales, float8_e4m3fn `(out, in / 16)`, from 2^-6 to 448; those of
        blocks of zeros are 2^-6.

    Raises:
        ValueError: the global scale is not a power of two within its limits, `in` is no multiple of 16, or a weight is
            not finite or larger than the scale allows.
    """
    _check_global_scale(scale)
    if weight.dim() != 2 or weight.shape[1] % BLOCK:
        raise ValueError(f"blocks of {BLOCK} inputs do not divide a weight {tuple(weight.shape)}")
    blocks = weight.float().unflatten(-1, (-1, BLOCK))
    amax = blocks.abs().amax(-1)
    if not bool((amax <= E2M1_MAX * E4M3.max * scale).all()):
        raise ValueError(f"weights are not finite, or exceed 6 * 448 * {scale:g}, the range of the global scale")
    # Divided by a tensor, because on some devices torch replaces division by a number with a multiplication.
    nearest = E4M3.cast(amax / torch.full((), E2M1_MAX * scale, dtype=torch.float32, device=amax.device))
    chosen, values = _best(blocks, nearest.view(torch.uint8).int(), scale, offsets)
    return pack_nibbles(e2m1_codes(values).flatten(-2)), chosen.view(torch.float8_e4m3fn)


def dequantize_packed(packed: Tensor, block_scale: Tensor, scale: float) -> Tensor:
    """`code * block_scale * global_scale`, fp32 `(out, in)`; exact if the global scale is a power of two.

    Args:
        packed: codes, uint8 `(out, in / 2)`.
        block_scale: float8_e4m3fn `(out, in / 16)`; NaN gives NaN.
        scale: the global scale.
    """
    values = e2m1_values(unpack_nibbles(packed)).unflatten(-1, (-1, BLOCK))
    weight: Tensor = (values * (block_scale.float() * scale).unsqueeze(-1)).flatten(-2)
    return weight


def _best(blocks: Tensor, nearest: Tensor, scale: float, offsets: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The codes of the best block scales, uint8 `(out, blocks)`, and E2M1 values for them, `(out, blocks, 16)`."""
    least: Tensor | None = None
    for offset in offsets:
        code = (nearest + offset).clamp(*BLOCK_SCALE_CODES).to(torch.uint8)
        factor = (code.view(torch.float8_e4m3fn).float() * scale).unsqueeze(-1)
        values = e2m1_round(blocks / factor)
        if len(offsets) == 1:
            return code, values
        error = _sum((values * factor).sub_(blocks).square_())
        if least is None:
            least, chosen, best = error, code, values
            continue
        better = error < least
        least = torch.where(better, error, least)
        chosen = torch.where(better, code, chosen)
        best = torch.where(better.unsqueeze(-1), values, best)
    return chosen, best


def _sum(squares: Tensor) -> Tensor:
    """The sum of each block's 16 numbers, in a fixed order: halves are added until one number is left."""
    while squares.shape[-1] > 1:
        half = squares.shape[-1] // 2
        squares = squares[..., :half] + squares[..., half:]
    return squares[..., 0]


def _check_global_scale(scale: float) -> None:
    if not SMALLEST_GLOBAL_SCALE <= scale <= LARGEST_GLOBAL_SCALE or math.frexp(scale)[0] != 0.5:
        raise ValueError(f"a global scale must be a power of two from 2^-18 to 2^8, got {scale!r}")
