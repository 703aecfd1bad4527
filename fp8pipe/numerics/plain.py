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

__all__ = [
    "block_scales_plain", "decode_e4m3", "dequantize_plain", "grid_numbers", "quantize_plain", "round_bf16",
    "row_errors", "squares",
]  # fmt: skip

_LARGEST: Final = 448.0
_FLOOR: Final = 1e-12  # lower bound for a row's amax, so that a row of zeros has a positive scale
_ROWS: Final = 1 << 18  # number of elements processed at a time, few enough to stay in the processor's cache


def decode_e4m3(byte: int) -> float:
    """The number that an E4M3 code stands for."""
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, byte >> 3 & 15, byte & 7
    if (exponent, mantissa) == (15, 7):
        return float("nan")
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


_VALUES: Final[NDArray[np.float32]] = np.array([decode_e4m3(byte) for byte in range(256)], np.float32)


def dequantize_plain(
    codes: Tensor, scale: Tensor, *, transposed: bool = False, block: tuple[int, int] | None = None
) -> Tensor:
    """The dequantized weight, `code * scale` in fp32; same arguments as `grids.dequantize_weight`.

    With `block`, the (rows, columns) of blocks that share a scale, `scale` is one value or one per block.
    """
    factor = scale.numpy().reshape(1, -1) if transposed and scale.ndim == 2 else scale.numpy()
    if block is not None and scale.ndim == 2:
        factor = _spread(factor, block, codes.shape)
    values = _VALUES.take(codes.contiguous().view(torch.uint8).numpy(), mode="clip")  # skips the bounds check
    values *= factor
    return torch.from_numpy(values)


def quantize_plain(weight: Tensor, *, transposed: bool = False, block: tuple[int, int] | None = None) -> Tensor:
    """Round a weight to E4M3 with one scale per output row, or per block, and dequantize it.

    Like `grids.quantize_weight` and `blocks.quantize_blocks`: a scale is `amax / 448`, computed in float64 and stored
    as fp32; the weights are divided by it in fp32, and the quotients are rounded exactly.

    Args:
        weight: any floating-point dtype, `(out, in)`, or `(in, out)` if `transposed`.
        transposed: whether outputs are along the second axis.
        block: (rows, columns) of the blocks that share a scale; None for one scale per output row.

    Returns:
        `code * scale` in fp32, in the shape of `weight`.
    """
    rows = weight.t() if transposed else weight
    found = torch.empty(rows.shape, dtype=torch.float32)
    for part in _parts(rows, block):
        values: NDArray[np.float32] = rows[part].float().numpy()
        scale = _scale(values, block)
        found[part] = torch.from_numpy(_nearest(values / scale) * scale)
    return found.t().contiguous() if transposed else found


def block_scales_plain(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """The scales of `blocks.quantize_blocks`, fp32 `(rows of blocks, columns of blocks)`."""
    scales = [_scale(weight[part].float().numpy(), block)[:: block[0], :: block[1]] for part in _parts(weight, block)]
    return torch.from_numpy(np.concatenate(scales))


def _scale(values: NDArray[np.float32], block: tuple[int, int] | None) -> NDArray[np.float32]:
    """`amax / 448` of each row or block, broadcastable to `values`."""
    if block is None:
        amax = np.abs(values).max(axis=1, keepdims=True, initial=0.0)
    else:
        amax = _reduce(np.maximum, np.abs(values), block)
    scale = (np.maximum(amax.astype(np.float64), _FLOOR) / _LARGEST).astype(np.float32)
    return scale if block is None else _spread(scale, block, values.shape)


def _reduce(ufunc: np.ufunc, values: NDArray[Any], block: tuple[int, int]) -> NDArray[Any]:
    """Reduce each block to one value; the last ones may be incomplete."""
    rows, columns = (np.arange(0, size, step) for size, step in zip(values.shape, block, strict=True))
    found: NDArray[Any] = ufunc.reduceat(ufunc.reduceat(values, columns, axis=1), rows, axis=0)
    return found


def _spread(scale: NDArray[np.float32], block: tuple[int, int], shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The scale of each element."""
    rows, columns = (np.arange(size) // step for size, step in zip(shape, block, strict=True))
    return scale[np.ix_(rows, columns)]


def round_bf16(values: Tensor) -> Tensor:
    """Round finite values to bf16 (to nearest, ties to even); the result is an fp32 tensor."""
    bits: NDArray[Any] = values.float().contiguous().numpy().view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return torch.from_numpy(rounded.view(np.float32))


def row_errors(
    values: Tensor, original: Tensor, *, transposed: bool = False, block: tuple[int, int] | None = None
) -> float:
    """Largest relative error of an output row, or of a block: norm of the difference divided by that of the original.

    Args:
        values: the approximation, of the same shape as `original`.
        original: `(out, in)`, or `(in, out)` if `transposed`; a tensor of another dimension counts as one row.
        transposed: whether outputs are along the second axis.
        block: (rows, columns) of the blocks; None for rows.

    Returns:
        The error, computed in float64; NaN if a value is NaN.
    """
    if original.ndim != 2:
        values, original = values.reshape(1, -1), original.reshape(1, -1)
    elif transposed:
        values, original = values.t(), original.t()
    worst = [0.0]
    for part in _parts(original, block):
        true = original[part].float().numpy()
        error, norm = _norms(values[part].float().numpy() - true, block), _norms(true, block)
        ratio = np.divide(error, norm, out=np.where(error > 0, np.inf, 0.0), where=norm > 0)
        worst.append(float(ratio.max(initial=0.0)))
    return float(np.max(worst))  # unlike max(), this propagates NaN


def squares(values: Tensor, original: Tensor) -> tuple[float, float]:
    """Sum of squares of `values - original`, and of `original`, both in float64; for tensors of any shape."""
    true = original.reshape(1, -1).float().numpy()
    error = values.reshape(1, -1).float().numpy() - true
    return float(np.square(error, dtype=np.float64).sum()), float(np.square(true, dtype=np.float64).sum())


def _norms(rows: NDArray[np.float32], block: tuple[int, int] | None) -> NDArray[np.float64]:
    """Norm of each row, or of each block."""
    squared = np.square(rows, dtype=np.float64)
    found: NDArray[np.float64] = np.sqrt(squared.sum(axis=1) if block is None else _reduce(np.add, squared, block))
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


def _parts(rows: Tensor, block: tuple[int, int] | None = None) -> list[slice]:
    """Ranges of rows that are processed one at a time: whole rows of blocks, if there are blocks."""
    height = 1 if block is None else block[0]
    size = max(1, _ROWS // max(1, rows.shape[1]) // height) * height
    return [slice(start, start + size) for start in range(0, rows.shape[0], size)]
