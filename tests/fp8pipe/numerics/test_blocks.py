"""One scale per block: against loops over single blocks, against numpy, and taken apart between blocks of rows."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fp8pipe.numerics.blocks import (
    block_grid,
    block_scale,
    dequantize_blocks,
    quantize_blocks,
    spread_scale,
)
from fp8pipe.numerics.grids import same_bits
from fp8pipe.numerics.kinds import FP8_BLOCK
from fp8pipe.numerics.plain import block_scales_plain, dequantize_plain, quantize_plain, row_errors

NUMBERS = st.floats(-(2.0**40), 2.0**40, width=32, allow_subnormal=False)
MATRICES = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=NUMBERS)
SMALL = (4, 3)


def by_hand(weight: np.ndarray, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes as bytes, scales, and values: block by block, rounded by ml_dtypes."""
    (rows, columns), (height, width) = weight.shape, block
    codes, values = np.zeros(weight.shape, np.uint8), np.zeros(weight.shape, np.float32)
    scales = np.zeros((-(-rows // height), -(-columns // width)), np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            here = np.s_[i * height : (i + 1) * height, j * width : (j + 1) * width]
            scales[i, j] = np.float32(max(float(np.abs(weight[here]).max()), 1e-12) / 448.0)
            quotients = np.clip(weight[here] / scales[i, j], -448, 448)
            rounded = quotients.astype(np.float64).astype(ml_dtypes.float8_e4m3fn)
            codes[here], values[here] = rounded.view(np.uint8), rounded.astype(np.float32) * scales[i, j]
    return codes, scales, values


@settings(max_examples=200, deadline=None)
@given(values=MATRICES)
def test_blocks_are_rounded_one_by_one(values: np.ndarray) -> None:
    weight = torch.from_numpy(values)
    codes, scale = quantize_blocks(weight, SMALL)
    expected = by_hand(values, SMALL)
    assert np.array_equal(codes.view(torch.uint8).numpy(), expected[0])
    assert same_bits(scale, torch.from_numpy(expected[1]))
    assert same_bits(dequantize_blocks(codes, scale, SMALL), torch.from_numpy(expected[2]))
    assert same_bits(quantize_plain(weight, block=SMALL), torch.from_numpy(expected[2]))
    assert same_bits(block_scales_plain(weight, SMALL), scale)
    assert same_bits(dequantize_plain(codes, scale, block=SMALL), torch.from_numpy(expected[2]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_of_blocks_can_be_taken_apart(dtype: torch.dtype) -> None:
    weight = torch.randn(3 * 128 + 40, 300, generator=torch.Generator().manual_seed(1)).to(dtype)
    codes, scale = quantize_blocks(weight)
    assert tuple(scale.shape) == block_grid(weight.shape, FP8_BLOCK) == (4, 3)
    parts = [quantize_blocks(part) for part in weight.split(128)]
    assert same_bits(torch.cat([part for part, _ in parts]), codes)
    assert same_bits(torch.cat([part for _, part in parts]), scale)
    # 3 x 2^18 elements are more than the plain code takes at a time.
    wide = torch.randn(3 * 128, 2048, generator=torch.Generator().manual_seed(2)).to(dtype)
    assert same_bits(quantize_plain(wide, block=FP8_BLOCK), dequantize_blocks(*quantize_blocks(wide)))
    assert same_bits(block_scales_plain(wide, FP8_BLOCK), quantize_blocks(wide)[1])


def test_a_block_of_zeros_has_a_tiny_positive_scale() -> None:
    weight = torch.ones(8, 6)
    weight[:4, :3] = -0.0
    codes, scale = quantize_blocks(weight, SMALL)
    assert scale.tolist() == [pytest.approx([1e-12 / 448, 1 / 448], rel=1e-7), pytest.approx([1 / 448] * 2, rel=1e-7)]
    assert torch.equal(dequantize_blocks(codes, scale, SMALL), weight)


def test_a_scale_per_tensor_is_repeated_and_other_shapes_are_refused() -> None:
    for scalar in (torch.tensor(0.25), torch.tensor([0.25])):
        assert same_bits(block_scale(scalar, (8, 7), SMALL), torch.full((2, 3), 0.25))
    grid = torch.rand(2, 3)
    assert same_bits(block_scale(grid, (8, 7), SMALL), grid)
    for wrong in (torch.rand(8, 1), torch.rand(3, 2), torch.rand(6)):
        with pytest.raises(ValueError, match=r"\(2, 3\)"):
            block_scale(wrong, (8, 7), SMALL)
    with pytest.raises(ValueError, match="float32"):
        block_scale(grid.bfloat16(), (8, 7), SMALL)


def test_a_stack_of_weights_has_a_grid_for_each() -> None:
    assert block_grid((5, 9, 7), SMALL) == (5, 3, 3)
    assert block_grid((6, 5, 8, 6), SMALL) == (6, 5, 2, 2)


def test_a_single_column_of_blocks_broadcasts() -> None:
    assert spread_scale(torch.tensor([[1.0], [2.0]]), (2, 9), (3, 5)).tolist() == [[1.0], [1.0], [2.0]]
    assert spread_scale(torch.tensor([[1.0, 2.0]]), (2, 2), (1, 3)).tolist() == [[1.0, 1.0, 2.0]]


def test_the_error_of_a_block_is_its_own() -> None:
    original = torch.ones(8, 6)
    values = original.clone()
    values[4:, :3] += 0.5  # in one block alone
    assert row_errors(values, original, block=SMALL) == pytest.approx(0.5)
    assert row_errors(values, original) == pytest.approx(0.5 * 0.5**0.5)  # of a row only three elements of six
    assert np.isnan(row_errors(original * float("nan"), original, block=SMALL))
