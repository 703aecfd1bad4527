"""E4M3 weights with one scale per block of rows and columns, as DeepSeek-V3 and the preset FP8_BLOCK store them.

A block is `(rows, columns)`, usually 128 x 128. Blocks start at the first row and column, so the last ones along each
axis may be incomplete. The scales of a matrix form a matrix themselves, the grid. A weight can be taken apart between
blocks of rows without changing any code or scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8pipe.numerics.grids import E4M3, amax_scale
from fp8pipe.numerics.kinds import FP8_BLOCK

__all__ = ["block_grid", "block_scale", "dequantize_blocks", "quantize_blocks", "spread_scale"]


def block_grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of a block-quantized weight: `(..., rows of blocks, columns of blocks)`.

    Args:
        shape: of the weight, `(..., rows, columns)`; the last block along each axis may be incomplete.
        block: (rows, columns) of a block.
    """
    rows, columns = shape[-2:]
    return (*shape[:-2], -(-rows // block[0]), -(-columns // block[1]))


def spread_scale(scale: Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """Repeat the scales `(rows of blocks, columns of blocks)` for every element; broadcastable to `shape`.

    A single column of blocks is repeated along the rows only.
    """
    spread = scale.repeat_interleave(block[0], 0)[: shape[0]]
    return spread if spread.shape[1] == 1 else spread.repeat_interleave(block[1], 1)[:, : shape[1]]


def block_scale(scale: Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> Tensor:
    """The scale of a weight `shape` as one scale per block, fp32 `block_grid(shape, block)`.

    Args:
        scale: fp32; per tensor, `()` or `(1,)`, which is repeated, or per block.
        shape: of the weight, `(rows, columns)`.
        block: (rows, columns) of a block.

    Raises:
        ValueError: the scale has another shape or dtype.
    """
    grid = block_grid(shape, block)
    if scale.dtype != torch.float32:
        raise ValueError(f"a weight scale is float32, got {scale.dtype}")
    if scale.shape in {torch.Size([]), torch.Size([1])}:
        return scale.reshape(1, 1).repeat(grid)
    if tuple(scale.shape) != grid:
        raise ValueError(f"a scale per block is () or {grid}, got {tuple(scale.shape)}")
    return scale.contiguous()


def quantize_blocks(weight: Tensor, block: tuple[int, int] = FP8_BLOCK) -> tuple[Tensor, Tensor]:
    """Round a weight to the nearest E4M3 codes, with one scale per block that maps the block's amax to 448.

    Scales and quotients are computed as by `grids.quantize_weight`; the scale of a block of zeros is a tiny positive
    number.

    Args:
        weight: finite, any floating-point dtype, `(out, in)`.
        block: (rows, columns) of a block.

    Returns:
        Codes, float8_e4m3fn in the shape of `weight`, and the positive scales, fp32 `block_grid(weight.shape, block)`.
    """
    (rows, columns), (height, width) = weight.shape, block
    down, across = block_grid(weight.shape, block)
    values = torch.nn.functional.pad(weight.float(), (0, across * width - columns, 0, down * height - rows))
    tiles = values.view(down, height, across, width)
    scale = amax_scale(torch.maximum(tiles.amin(dim=(1, 3)).neg(), tiles.amax(dim=(1, 3))), E4M3)
    codes = E4M3.cast(tiles / scale[:, None, :, None]).view(values.shape)
    return codes[:rows, :columns].contiguous(), scale


def dequantize_blocks(codes: Tensor, scale: Tensor, block: tuple[int, int] = FP8_BLOCK) -> Tensor:
    """The dequantized weight, `code * scale` in fp32, for codes `(out, in)` and one scale per block."""
    return codes.float() * spread_scale(scale, block, codes.shape)
