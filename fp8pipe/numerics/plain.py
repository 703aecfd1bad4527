"""An independent implementation of E4M3 and bf16 in numpy, used to verify results.

It shares no code with `grids`, because comparing a quantizer with itself would prove nothing. Codes are decoded from
their sign, exponent and mantissa (OCP 8-bit floating point, revision 1.0). Numbers are rounded to nearest, ties to
even, without inexact intermediate steps.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["dequantize_plain", "grid_numbers", "quantize_plain", "round_bf16", "row_errors", "squares"]

_LARGEST: Final = 448.0
_FLOOR: Final = 1e-12  # lower bound for a row's amax, so that a row of zeros has a positive scale
_ROWS: Final = 1 << 18  # number of elements processed at a time, few enough to stay in the processor's cache


def _decode(byte: int) -> float:
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, byte >> 3 & 15, byte & 7
    if (exponent, mantissa) == (15, 7):
        return float("nan")
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


_VALUES: Final[NDArray[np.float32]] = np.array([_decode(byte) for byte in range(256)], np.float32)


def dequantize_plain(codes: Tensor, scale: Tensor, *, transposed: bool = False) -> Tensor:
    """The dequantized weight, `code * scale` in fp32; same arguments as `grids.dequantize_weight`."""
    factor = scale.numpy().reshape(1, -1) if transposed and scale.ndim == 2 else scale.numpy()
    values = _VALUES.take(codes.contiguous().view(torch.uint8).numpy(), mode="clip")  # skips the bounds check
    values *= factor
    return torch.from_numpy(values)


def quantize_plain(weight: Tensor, *, transposed: bool = False) -> Tensor:
    """Round a weight to E4M3 with one scale per output row, like `grids.quantize_weight`, and dequantize it.

    The scale of a row is `amax / 448`, computed in float64 and stored as fp32; the weights are divided by it in fp32,
    and the quotients are rounded exactly.

    Args:
        weight: any floating-point dtype, `(out, in)`, or `(in, out)` if `transposed`.
        transposed: whether outputs are along the second axis.

    Returns:
        `code * scale` in fp32, in the shape of `weight`.
    """
    rows = weight.t() if transposed else weight
    found = torch.empty(rows.shape, dtype=torch.float32)
    for part in _parts(rows):
        values = rows[part].float().numpy()
        amax = np.maximum(np.abs(values).max(axis=1, keepdims=True, initial=0.0).astype(np.float64), _FLOOR)
        scale = (amax / _LARGEST).astype(np.float32)
        found[part] = torch.from_numpy(_nearest(values / scale) * scale)
    return found.t().contiguous() if transposed else found


def round_bf16(values: Tensor) -> Tensor:
    """Round finite values to bf16 (to nearest, ties to even); the result is an fp32 tensor."""
    bits: NDArray[Any] = values.float().contiguous().numpy().view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return torch.from_numpy(rounded.view(np.float32))


def row_errors(values: Tensor, original: Tensor, *, transposed: bool = False) -> float:
    """Largest relative error of an output row: norm of the difference divided by the norm of the original row.

    Args:
        values: the approximation, of the same shape as `original`.
        original: `(out, in)`, or `(in, out)` if `transposed`; a tensor of another dimension counts as one row.
        transposed: whether outputs are along the second axis.

    Returns:
        The error, computed in float64; NaN if a value is NaN.
    """
    if original.ndim != 2:
        values, original = values.reshape(1, -1), original.reshape(1, -1)
    elif transposed:
        values, original = values.t(), original.t()
    worst = [0.0]
    for part in _parts(original):
        true = original[part].float().numpy()
        error, norm = _norms(values[part].float().numpy() - true), _norms(true)
        ratio = np.divide(error, norm, out=np.where(error > 0, np.inf, 0.0), where=norm > 0)
        worst.append(float(ratio.max(initial=0.0)))
    return float(np.max(worst))  # unlike max(), this propagates NaN


def squares(values: Tensor, original: Tensor) -> tuple[float, float]:
    """Sum of squares of `values - original`, and of `original`, both in float64; for tensors of any shape."""
    true = original.reshape(1, -1).float().numpy()
    error = values.reshape(1, -1).float().numpy() - true
    return float(np.square(error, dtype=np.float64).sum()), float(np.square(true, dtype=np.float64).sum())


def _norms(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.sqrt(np.square(rows, dtype=np.float64).sum(axis=1))
    return found


def grid_numbers(quotients: Tensor) -> Tensor:
    """Round each quotient to the nearest E4M3 number, saturating, ties to even; the result is an fp32 tensor."""
    return torch.from_numpy(_nearest(quotients.float().contiguous().numpy()))


def _nearest(quotients: NDArray[np.float32]) -> NDArray[np.float32]:
    """Like `grid_numbers`, for numpy arrays."""
    found: NDArray[np.float32] = np.clip(quotients, np.float32(-_LARGEST), np.float32(_LARGEST))
    exponent = np.maximum(found.view(np.uint32) >> np.uint32(23) & np.uint32(255), np.uint32(127 - 6))
    step = (exponent - np.uint32(3) << np.uint32(23)).view(np.float32)  # a power of two, so only rint() rounds
    found /= step
    np.rint(found, out=found)
    found *= step
    return found


def _parts(rows: Tensor) -> list[slice]:
    size = max(1, _ROWS // max(1, rows.shape[1]))
    return [slice(start, start + size) for start in range(0, rows.shape[0], size)]
