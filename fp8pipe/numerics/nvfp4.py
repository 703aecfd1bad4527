"""NVFP4: 4-bit floating-point codes with two-level scaling in blocks of 16, the format of Blackwell's tensor cores.

`value = code * block_scale * tensor_scale`. A code is E2M1 (a sign and one of 0, 0.5, 1, 1.5, 2, 3, 4, 6), a block
scale is E4M3 and shared by 16 consecutive elements along the input dimension, and the tensor scale is one number for
the whole tensor. Block scales of weights are stored. Those of activations are computed at run time, as
`E4M3(amax / (6 * tensor_scale))` of each block, like TensorRT's DynamicQuantize; only their tensor scale is calibrated.

Tensor scales are always powers of two here. The format allows any fp32 number, but then `block_scale * tensor_scale` is
rounded to the dtype that an engine uses for it, so that the results of two engines differ. With a power of two, this
product is exact in fp32, and also in FP16 unless it is below FP16's smallest number; and the order of divisions by the
two scales does not matter. The cost is one of the eighteen binades of an E4M3 block scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fp8pipe.numerics.grids import E4M3
from fp8pipe.numerics.kinds import NVFP4_BLOCK, Kind

BLOCK: Final = NVFP4_BLOCK
E2M1_MAX: Final = 6.0
_GRID: Final = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SIGN: Final = 8
_SMALLEST_TENSOR_SCALE: Final = 2.0**-18  # same as the minimum of all other scales; exact in FP16
_LARGEST_TENSOR_SCALE: Final = 2.0**15
# Mapping a block's largest weight to 4 instead of 6 uses the part of the grid with smaller steps, which may reduce the
# error. Block scales that are up to 1.5 times as large are therefore tried, and the tensor scale has to allow for them.
_HEADROOM: Final = E2M1_MAX / 4.0
# Candidates for a block scale, as offsets from the E4M3 code of the scale that maps the block's largest weight to 6.
# Eight codes are a factor of two.
_CANDIDATES: Final = (0, *(d for step in range(1, 8) for d in (-step, step)))
_LARGEST_SCALE_CODE: Final = 0x7E  # 448


def e2m1_round(units: Tensor) -> Tensor:
    """Round fp32 values to the nearest E2M1 value, ties to the even code, saturating at 6; zeros keep their sign."""
    magnitude = units.abs()
    step = torch.where(magnitude < 2.0, 0.5, torch.where(magnitude < 4.0, 1.0, 2.0))
    return torch.round(units / step).mul_(step).clamp_(-E2M1_MAX, E2M1_MAX)


def e2m1_codes(values: Tensor) -> Tensor:
    """The codes of E2M1 values (as returned by `e2m1_round`): uint8, 0 to 15, with the sign in bit 3."""
    magnitude = values.abs()
    index = torch.where(magnitude < 2.0, 2 * magnitude, torch.where(magnitude < 4.0, magnitude + 2, magnitude / 2 + 4))
    return index.to(torch.uint8) + _SIGN * values.signbit().to(torch.uint8)


def e2m1_values(codes: Tensor) -> Tensor:
    """The values of codes 0 to 15, fp32."""
    grid = torch.tensor([*_GRID, *(-value for value in _GRID)], device=codes.device)
    return grid[codes.long()]


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack pairs of codes along the last axis into bytes, the first in the low nibble: `(..., n)` to `(..., n / 2)`."""
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`: `(..., n / 2)` to `(..., n)`."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def tensor_scale(amax: float) -> float:
    """The smallest power of two from 2^-18 to 2^15 with which `amax` can be represented: `6 * 448 * scale >= amax`."""
    wanted = amax / (E2M1_MAX * E4M3.max)
    scale = 2.0 ** math.ceil(math.log2(wanted)) if wanted > 0 else 0.0
    return min(max(scale, _SMALLEST_TENSOR_SCALE), _LARGEST_TENSOR_SCALE)


def _blocks(x: Tensor) -> Tensor:
    blocks: Tensor = x.unflatten(-1, (-1, BLOCK))
    return blocks


def block_units(x: Tensor, scale: Tensor) -> Tensor:
    """Divide each block of `x` by its scale, before rounding to E2M1.

    Args:
        x: `(..., n)`, where n is a multiple of 16.
        scale: scales of the blocks, `(..., n / 16)`.

    Returns:
        The quotients by block, `(..., n / 16, 16)`; zeros where the scale is zero.
    """
    return _blocks(x) / torch.where(scale > 0, scale, math.inf).unsqueeze(-1)


def _nearest_block_scales(amax: Tensor, tensor_scale: float) -> Tensor:
    # The divisor is a tensor, because on some devices torch replaces division by a Python number with multiplication
    # by its reciprocal. It is created on the device, because a copy from the host would synchronize with the GPU.
    return E4M3.cast(amax / torch.full((), E2M1_MAX * tensor_scale, dtype=torch.float32, device=amax.device))


def _check_tensor_scale(scale: float) -> None:
    if not _SMALLEST_TENSOR_SCALE <= scale <= _LARGEST_TENSOR_SCALE or math.frexp(scale)[0] != 0.5:
        raise ValueError(f"a tensor scale must be a power of two from 2^-18 to 2^15, got {scale!r}")


@dataclass(frozen=True, slots=True)
class BlockQuantizer:
    """Quantizes activations to NVFP4: block scales are computed from each tensor, the tensor scale is fixed.

    Raises:
        ValueError: the tensor scale is not a power of two from 2^-18 to 2^15.
    """

    tensor_scale: float  # a power of two

    def __post_init__(self) -> None:
        _check_tensor_scale(self.tensor_scale)

    @property
    def kind(self) -> Kind:
        """The family of codes."""
        return Kind.NVFP4

    def block_scales(self, x: Tensor) -> Tensor:
        """The block scales of `x` `(..., n)`, `E4M3(amax / (6 * tensor_scale))`: `(..., n / 16)` float8_e4m3fn."""
        return _nearest_block_scales(_blocks(x.float()).abs().amax(-1), self.tensor_scale)

    def scales(self, x: Tensor) -> Tensor:
        """The factor of each block's codes, `block_scale * tensor_scale`: `(..., n / 16)` fp32."""
        return self.block_scales(x).float() * self.tensor_scale

    def codes(self, x: Tensor) -> Tensor:
        """E2M1 codes of `x`, whose last axis is a multiple of 16: uint8, 0 to 15."""
        return e2m1_codes(e2m1_round(block_units(x.float(), self.scales(x)))).flatten(-2)

    def fake(self, x: Tensor) -> Tensor:
        """Quantize and dequantize `x`: `code * block_scale * tensor_scale` in fp32; the multiplications are exact."""
        scale = self.scales(x)
        return e2m1_round(block_units(x.float(), scale)).mul_(scale.unsqueeze(-1)).flatten(-2)


@dataclass(frozen=True, slots=True)
class BlockScales:
    """The scales of a weight in NVFP4.

    Raises:
        ValueError: the tensor scale is not a power of two from 2^-18 to 2^15, or a block scale is not positive.
    """

    block: Tensor  # `(out, in / 16)` float8_e4m3fn, positive
    tensor: float  # a power of two

    def __post_init__(self) -> None:
        _check_tensor_scale(self.tensor)
        if self.block.dtype != torch.float8_e4m3fn or not bool((self.block.float() > 0).all()):
            raise ValueError("block scales must be positive E4M3 numbers")

    @property
    def product(self) -> Tensor:
        """`block * tensor`, `(out, in / 16)` fp32, exact."""
        return self.block.float() * self.tensor


@dataclass(frozen=True, slots=True)
class BlockCodes:
    """The codes of one weight in NVFP4."""

    codes: Tensor  # `(out, in)` uint8, one E2M1 code (0 to 15) each
    scales: BlockScales  # scales of the blocks along the input dimension

    @property
    def kind(self) -> Kind:
        """The family of codes."""
        return Kind.NVFP4

    @property
    def bits(self) -> int:
        """Bits per code."""
        return 4

    @property
    def scale(self) -> Tensor:
        """The factor of each block's codes, `block_scale * tensor_scale`: `(out, in / 16)` fp32."""
        return self.scales.product

    def dequantize(self) -> Tensor:
        """`code * block_scale * tensor_scale`, `(out, in)` fp32, exact."""
        return (_blocks(e2m1_values(self.codes)) * self.scale.unsqueeze(-1)).flatten(-2)

    @classmethod
    def of(cls, weight: Tensor, scales: BlockScales) -> BlockCodes:
        """Round a weight `(out, in)` to the nearest codes for the given scales."""
        return cls(e2m1_codes(e2m1_round(block_units(weight.float(), scales.product))).flatten(-2), scales)


def choose_block_scales(weight: Tensor, *, search: bool = True) -> BlockScales:
    """Choose the scales of a weight such that each block has the smallest squared rounding error.

    The candidates for a block scale are the E4M3 number that maps the block's largest weight nearest to 6, and its
    seven neighbours on either side. With smaller scales, the largest weights saturate; with larger ones, the largest
    weight is mapped to 4 or 3, where the steps of the grid are smaller.

    Args:
        weight: `(out, in)`, any floating-point dtype; `in` is a multiple of 16.
        search: whether to compare the candidates; False to use the scale that maps the largest weight nearest to 6.
    """
    blocks = _blocks(weight.detach().float())
    amax = blocks.abs().amax(-1)
    tensor = tensor_scale(float(amax.max()) * _HEADROOM)
    nearest = _nearest_block_scales(amax, tensor).view(torch.uint8).int()
    best = torch.full_like(amax, math.inf)
    chosen = torch.zeros_like(nearest, dtype=torch.uint8)
    for offset in _CANDIDATES if search else (0,):
        code = (nearest + offset).clamp(1, _LARGEST_SCALE_CODE).to(torch.uint8)
        scale = (code.view(torch.float8_e4m3fn).float() * tensor).unsqueeze(-1)
        error = (e2m1_round(blocks / scale).mul_(scale) - blocks).square().sum(-1)
        chosen = torch.where(error < best, code, chosen)
        best = torch.minimum(error, best)
    return BlockScales(chosen.view(torch.float8_e4m3fn), tensor)
