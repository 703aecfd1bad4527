"""Dequantizes FP8 weights: `code * scale`.

The scale is called `weight_scale` in compressed-tensors and ModelOpt, and `weight_scale_inv` in DeepSeek's block format
("inv" because it is the inverse of the factor used when quantizing); in all of them the codes are multiplied by it. The
product is computed in fp32, where it is exact for bf16 and fp16 scales, and rounded once to the model's dtype, as in
the libraries that define these formats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8pipe.numerics.blocks import block_grid, spread_scale

__all__ = ["dequantize_codes"]

_CHUNK = 1 << 24  # elements converted to fp32 at a time, to limit memory use


def dequantize_codes(codes: Tensor, scale: Tensor, block: tuple[int, int] | None, dtype: torch.dtype) -> Tensor:
    """The dequantized weight, on the CPU.

    Args:
        codes: E4M3, `(..., rows, columns)`.
        scale: floating point. Without `block`: one value, or one per row, `(..., rows)` or `(..., rows, 1)`. With
            `block`: the shape that `block_grid` gives, or ModelOpt's `(rows of blocks, 1, columns of blocks, 1)`.
        block: (rows, columns) of the blocks that share a scale; None for scales per tensor or per row.
        dtype: dtype of the result.

    Returns:
        `codes * scale` computed in fp32 and rounded once, in the shape of `codes`; a new tensor.
    """
    rows, columns = codes.shape[-2:]
    result = torch.empty(codes.shape, dtype=dtype)
    height, width = block or (1, columns)
    stack = codes.reshape(-1, rows, columns)
    grid = (stack.shape[0], *block_grid((rows, columns), (height, width)))
    scales = scale.float().reshape(()).expand(grid) if scale.numel() == 1 else scale.float().reshape(grid)
    step = max(1, _CHUNK // max(1, columns * height)) * height
    for matrix, factors, out in zip(stack, scales, result.view(-1, rows, columns), strict=True):
        for start in range(0, rows, step):
            part = matrix[start : start + step].float()
            here = factors[start // height : -(-(start + part.shape[0]) // height)]
            out[start : start + step] = part * spread_scale(here, (height, width), part.shape)
    return result
