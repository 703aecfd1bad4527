"""An independent implementation of NVFP4 in numpy, used to verify results.

Like `plain`, it shares no code with the quantizer. Codes and scales are decoded from their sign, exponent and mantissa.
A weight is rounded by comparing it with the midpoints between neighbouring numbers, times the scale; these products are
exact, and nothing is divided. Which block scale is chosen follows from the rule in `nvfp4_weights`: the candidate with
the least squared error, in fp32, summed by halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fp8pipe.numerics.plain import decode_e4m3, grid_numbers

__all__ = [
    "PlainNvfp4", "block_errors", "dequantize_nvfp4", "global_scale_plain", "nearest_e2m1", "quantize_nvfp4",
    "round_nvfp4",
]  # fmt: skip

_BLOCK: Final = 16


def _magnitude(exponent: int, mantissa: int) -> float:
    return mantissa / 2 if exponent == 0 else (2 + mantissa) * 2.0 ** (exponent - 2)


_E2M1: Final[NDArray[np.float32]] = np.array(
    [(-1.0 if code & 8 else 1.0) * _magnitude(code >> 1 & 3, code & 1) for code in range(16)], np.float32
)
_MIDPOINTS: Final = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)  # between the codes i and i + 1
_SCALES: Final[NDArray[np.float32]] = np.array([decode_e4m3(byte) for byte in range(0x7F)], np.float32)
_FIRST: Final = 8  # code of 2^-6, the smallest scale of a block


class PlainNvfp4(NamedTuple):
    """A weight rounded to NVFP4: codes uint8 `(out, in / 2)`, E4M3 scales `(out, in / 16)`, values fp32 `(out, in)`."""

    packed: Tensor
    scale: Tensor
    values: Tensor


def global_scale_plain(amax: float) -> float:
    """The smallest power of two, at least 2^-18, that maps twice `amax` into 6 * 448."""
    power = -18
    while 2 * amax > 6 * 448 * 2.0**power:
        power += 1
    return 2.0**power


def quantize_nvfp4(weight: Tensor, scale: float, offsets: Sequence[int]) -> PlainNvfp4:
    """Round a weight like `nvfp4_weights.quantize_packed`, with the same arguments."""
    blocks: NDArray[np.float32] = weight.float().numpy().reshape(weight.shape[0], -1, _BLOCK)
    amax = np.abs(blocks).max(axis=2)
    wanted = grid_numbers(torch.from_numpy(amax / np.float32(6 * scale))).numpy()
    nearest = np.searchsorted(_SCALES, wanted)
    least = np.full(amax.shape, np.inf, np.float32)
    chosen = np.zeros(amax.shape, np.uint8)
    codes = np.zeros(blocks.shape, np.uint8)
    for offset in offsets:
        candidate = np.clip(nearest + offset, _FIRST, len(_SCALES) - 1)
        factor = (_SCALES[candidate] * np.float32(scale))[..., None]
        found = _codes(blocks, factor)
        error = _E2M1[found] * factor - blocks
        total = _halves(error * error)
        better = total < least
        least[better], chosen[better], codes[better] = total[better], candidate[better], found[better]
    packed = codes.reshape(weight.shape)
    packed = packed[:, ::2] + 16 * packed[:, 1::2]
    values = _E2M1[codes] * (_SCALES[chosen] * np.float32(scale))[..., None]
    scales = torch.from_numpy(chosen).view(torch.float8_e4m3fn)
    return PlainNvfp4(torch.from_numpy(packed), scales, torch.from_numpy(values.reshape(weight.shape)))


def dequantize_nvfp4(packed: Tensor, block_scale: Tensor, divisor: float) -> Tensor:
    """`code * block_scale / divisor`, fp32 `(out, in)`: the form that compressed-tensors defines.

    Args:
        packed: codes, uint8 `(out, in / 2)`, the first of a pair in the low half.
        block_scale: float8_e4m3fn `(out, in / 16)`.
        divisor: the reciprocal of the global scale, as stored.
    """
    pairs = packed.contiguous().numpy()
    codes = np.stack([pairs % 16, pairs // 16], axis=-1).reshape(pairs.shape[0], -1, _BLOCK)
    table = np.array([decode_e4m3(byte) for byte in range(256)], np.float32)
    scales = table[block_scale.contiguous().view(torch.uint8).numpy()][..., None]
    values = _E2M1[codes] * scales / np.float32(divisor)
    return torch.from_numpy(values.reshape(pairs.shape[0], -1))


def nearest_e2m1(quotients: Tensor) -> Tensor:
    """Round each quotient to the nearest E2M1 number, saturating, ties to even; the result is an fp32 tensor."""
    return torch.from_numpy(_E2M1[_codes(quotients.float().contiguous().numpy(), np.float32(1.0))])


def round_nvfp4(values: Tensor, divisor: float) -> Tensor:
    """Round inputs to NVFP4 and back: each block to E2M1, with the E4M3 scale nearest to amax * divisor / 6.

    Args:
        values: `(..., features)`, any floating-point dtype; features are a multiple of 16.
        divisor: the reciprocal of the global scale, a power of two.

    Returns:
        A tensor with the shape and dtype of `values`; `code * scale / divisor` is exact in bf16.
    """
    blocks: NDArray[np.float32] = values.detach().float().cpu().contiguous().numpy().reshape(-1, _BLOCK)
    wanted = np.abs(blocks).max(axis=1, keepdims=True) * np.float32(divisor) / np.float32(6)
    factor = grid_numbers(torch.from_numpy(wanted)).numpy() / np.float32(divisor)
    found = _E2M1[_codes(blocks, factor)] * factor
    return torch.from_numpy(found.reshape(values.shape)).to(values.dtype)


def block_errors(values: Tensor, original: Tensor, scale: float) -> float:
    """Largest relative error of a block of 16: norm of the difference divided by that of the original.

    For a block that is too small for its own scale, the norm of the smallest that is not: 6 * 2^-6 * `scale`.

    Args:
        values: the approximation, `(out, in)`.
        original: `(out, in)`.
        scale: the global scale.

    Returns:
        The error, computed in float64; NaN if a value is NaN.
    """
    true = original.float().numpy().astype(np.float64).reshape(-1, _BLOCK)
    error = values.float().numpy().reshape(-1, _BLOCK) - true
    norm = np.maximum(np.sqrt((true * true).sum(axis=1)), 6 * 2.0**-6 * scale)
    ratio = np.sqrt((error * error).sum(axis=1)) / norm
    return float(np.max(ratio, initial=0.0))


def _codes(values: NDArray[np.float32], factor: Any) -> NDArray[np.uint8]:
    """The codes nearest to `values / factor`; a tie goes to the code whose last bit is zero."""
    magnitude = np.abs(values)
    found = np.where(np.signbit(values), np.uint8(8), np.uint8(0))
    for index, middle in enumerate(_MIDPOINTS):
        limit = np.float32(middle) * factor
        found += magnitude >= limit if index % 2 else magnitude > limit
    return found


def _halves(numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    for half in (8, 4, 2, 1):
        numbers = numbers[..., :half] + numbers[..., half:]
    return numbers[..., 0]
