"""NVFP4 weights of language models: every code and scale against ml_dtypes, rounding against plain numpy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8pipe.numerics.grids import same_bits
from fp8pipe.numerics.nvfp4_weights import (
    LARGEST_GLOBAL_SCALE,
    NEAREST,
    SEARCHED,
    SMALLEST_BLOCK_SCALE,
    SMALLEST_GLOBAL_SCALE,
    dequantize_packed,
    global_scale,
    quantize_packed,
)
from fp8pipe.numerics.plain_nvfp4 import (
    block_errors,
    dequantize_nvfp4,
    global_scale_plain,
    nearest_e2m1,
    quantize_nvfp4,
)

FP4, FP8 = ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn
CODES = np.arange(16, dtype=np.uint8)
SCALES = np.arange(0x08, 0x7F, dtype=np.uint8)  # every normal E4M3 number
BF16 = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)


@pytest.mark.parametrize("power", range(-18, 9))
def test_every_code_times_every_scale_is_exact_in_bf16(power: int) -> None:
    """All 16 codes, all 119 block scales and all global scales; the product in float64 is the exact one."""
    scale = 2.0**power
    packed = torch.from_numpy(np.tile(CODES[::2] | CODES[1::2] << 4, (len(SCALES), 1)))
    blocks = torch.from_numpy(SCALES.view(FP8).view(np.uint8).copy())[:, None].view(torch.float8_e4m3fn)
    exact = CODES.view(FP4).astype(np.float64) * SCALES.view(FP8).astype(np.float64)[:, None] * scale
    for found in (dequantize_packed(packed, blocks, scale), dequantize_nvfp4(packed, blocks, 1 / scale)):
        assert np.array_equal(found.double().numpy(), exact)
        assert np.array_equal(np.signbit(found.numpy()), np.signbit(exact))
        assert same_bits(found.bfloat16().float(), found)


def rounded_once(values: torch.Tensor) -> torch.Tensor:
    """Codes of values from -6 to 6 whose block scale is 1, because each block begins with 6."""
    blocks = torch.nn.functional.pad(values, (0, -len(values) % 15)).view(-1, 15)
    blocks = torch.cat([torch.full((len(blocks), 1), 6.0), blocks], 1)
    packed, scales = quantize_packed(blocks, 1.0, NEAREST)
    assert bool((scales.float() == 1).all())
    return torch.stack([packed & 15, packed >> 4], -1).view(-1, 16)[:, 1:].reshape(-1)[: len(values)]


def test_every_bf16_number_gets_the_code_of_ml_dtypes() -> None:
    values = BF16[BF16.abs() <= 6].float()
    expected = values.numpy().astype(FP4)
    assert np.array_equal(rounded_once(values).numpy(), expected.view(np.uint8))
    assert np.array_equal(nearest_e2m1(values).numpy(), expected.astype(np.float32))


def test_ties_and_their_neighbours_in_fp32() -> None:
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
    values = np.concatenate([ties, np.nextafter(ties, np.float32(9)), np.nextafter(ties, np.float32(0))])
    values = np.concatenate([values, -values])
    assert np.array_equal(rounded_once(torch.from_numpy(values)).numpy(), values.astype(FP4).view(np.uint8))


def test_every_amax_gets_the_nearest_scale_that_is_normal() -> None:
    """One block per positive bf16 number up to the range of the global scale."""
    scale = 2.0**-9
    amax = BF16[(BF16 > 0) & (6 * 448 * scale >= BF16)].float()
    blocks = torch.nn.functional.pad(amax[:, None], (0, 15))
    found = quantize_packed(blocks, scale, NEAREST)[1]
    exact = np.maximum(amax.double().numpy() / 6 / scale, SMALLEST_BLOCK_SCALE)  # ml_dtypes rounds float64 once
    assert np.array_equal(found.view(torch.uint8)[:, 0].numpy(), exact.astype(FP8).view(np.uint8))


def spread_weight(seed: int, rows: int = 12, columns: int = 64, *, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Rows of very different magnitudes, some blocks of zeros, and one that is tiny beside the others."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(rows, columns, generator=generator) * torch.logspace(-4, 1, rows)[:, None]
    found[1, :16], found[2, 16:32] = 0.0, -0.0
    found[3, :16] = 1e-9 * found[3, 16:32]
    found[4, 5] *= 40
    return found.to(dtype)


@given(st.integers(0, 10_000), st.sampled_from([torch.bfloat16, torch.float32]), st.sampled_from([NEAREST, SEARCHED]))
@settings(max_examples=60, deadline=None)
def test_both_implementations_agree_bit_for_bit(seed: int, dtype: torch.dtype, offsets: tuple[int, ...]) -> None:
    weight = spread_weight(seed, dtype=dtype)
    scale = global_scale(float(weight.abs().max()))
    packed, blocks = quantize_packed(weight, scale, offsets)
    plain = quantize_nvfp4(weight, scale, offsets)
    assert same_bits(packed, plain.packed)
    assert same_bits(blocks, plain.scale)
    assert same_bits(dequantize_packed(packed, blocks, scale), plain.values)
    assert block_errors(plain.values, weight, scale) < 0.265


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 2.5, 5.0]), min_size=16, max_size=16))
@settings(max_examples=200, deadline=None)
def test_of_equally_good_scales_the_first_is_chosen(values: list[float]) -> None:
    """Numbers of the grid itself, for which several scales have the same error, often zero."""
    weight = torch.tensor([values]) * 2.0**-7
    scale = global_scale(float(weight.abs().max()))
    packed, blocks = quantize_packed(weight, scale, SEARCHED)
    plain = quantize_nvfp4(weight, scale, SEARCHED)
    assert same_bits(packed, plain.packed)
    assert same_bits(blocks, plain.scale)


def test_searched_scales_are_the_best_of_their_candidates() -> None:
    """Against all candidates, each rounded by ml_dtypes and compared in float64; and better than the nearest scale."""
    weight = spread_weight(0, 64, 256, dtype=torch.float32)
    scale = global_scale(float(weight.abs().max()))
    blocks = weight.double().numpy().reshape(64, -1, 16)
    nearest = (np.abs(blocks).max(-1) / 6 / scale).astype(FP8).view(np.uint8).astype(int)
    errors = []
    for offset in SEARCHED:
        factor = np.clip(nearest + offset, 0x08, 0x7E).astype(np.uint8).view(FP8).astype(np.float64)[..., None] * scale
        codes = np.clip(blocks / factor, -6, 6).astype(np.float32).astype(FP4).astype(np.float64)
        errors.append(((codes * factor - blocks) ** 2).sum(-1))
    found = dequantize_packed(*quantize_packed(weight, scale, SEARCHED), scale).double().numpy().reshape(64, -1, 16)
    # fp32 sums of 16 squares have a relative error below 2^-20, so a candidate may win that is worse by so much.
    np.testing.assert_allclose(((found - blocks) ** 2).sum(-1), np.min(errors, 0), rtol=2.0**-19, atol=1e-30)
    assert np.min(errors, 0).sum() < 0.9 * errors[0].sum()


def test_blocks_of_zeros_and_tiny_blocks_have_the_smallest_normal_scale() -> None:
    weight = spread_weight(1)
    scale = global_scale(float(weight.abs().max()))
    packed, blocks = quantize_packed(weight, scale)
    values = dequantize_packed(packed, blocks, scale)
    for row, block in ((1, 0), (2, 1), (3, 0)):
        assert float(blocks[row, block]) == SMALLEST_BLOCK_SCALE
        assert not bool(values[row, 16 * block : 16 * block + 16].any())
    assert not bool(values[1, :16].signbit().any())
    assert bool(values[2, 16:32].signbit().all())  # zeros keep their sign
    assert float(blocks.float().min()) == SMALLEST_BLOCK_SCALE


def test_rows_are_independent() -> None:
    weight = spread_weight(2)
    whole = quantize_packed(weight, 2.0**-5)
    parts = [quantize_packed(part, 2.0**-5) for part in weight.split(5)]
    for index in (0, 1):
        assert same_bits(torch.cat([part[index] for part in parts]), whole[index])


@given(st.floats(min_value=0.0, max_value=344064.0, width=32))
@settings(max_examples=200, deadline=None)
def test_the_global_scale_is_the_smallest_that_leaves_room(amax: float) -> None:
    scale = global_scale(amax)
    assert scale == 2.0 ** round(np.log2(scale))
    assert 2 * amax <= 6 * 448 * scale
    assert scale == SMALLEST_GLOBAL_SCALE or 2 * amax > 6 * 448 * scale / 2
    assert global_scale_plain(amax) == scale


def test_the_range_of_the_global_scale() -> None:
    assert global_scale(344064.0) == LARGEST_GLOBAL_SCALE
    assert global_scale(1344 * 2.0**-4) == 2.0**-4
    for amax in (344065.0, float("inf"), float("nan"), -1.0):
        with pytest.raises(ValueError, match="344064"):
            global_scale(amax)


@pytest.mark.parametrize(
    ("weight", "scale", "why"),
    [
        (torch.ones(2, 24), 1.0, "do not divide"),
        (torch.ones(16), 1.0, "do not divide"),
        (torch.ones(2, 16), 0.3, "power of two"),
        (torch.ones(2, 16), 2.0**-19, "power of two"),
        (torch.ones(2, 16), 2.0**9, "power of two"),
        (torch.ones(2, 16), float("nan"), "power of two"),
        (torch.full((2, 16), 2689.0), 1.0, "exceed"),
        (torch.full((2, 16), float("inf")), 1.0, "not finite"),
        (torch.full((2, 16), float("nan")), 1.0, "not finite"),
    ],
)
def test_what_cannot_be_represented_is_refused(weight: torch.Tensor, scale: float, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        quantize_packed(weight, scale)


def test_nan_scales_give_nan() -> None:
    packed = torch.zeros(1, 8, dtype=torch.uint8)
    scale = torch.full((1, 1), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert bool(dequantize_packed(packed, scale, 1.0).isnan().all())
    assert bool(dequantize_nvfp4(packed, scale, 1.0).isnan().all())
