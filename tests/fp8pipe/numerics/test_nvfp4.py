"""NVFP4: rounding against ml_dtypes' casts, scales against exhaustive search, exactness by exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized_families import quantized_family
from vit_families import family, random_pixels

from fp8pipe.core.errors import BadArtifactError
from fp8pipe.models.vision.quantized import load_quantized, of_type, save_quantized
from fp8pipe.numerics.kinds import Kind, Precision
from fp8pipe.numerics.nvfp4 import (
    BLOCK,
    BlockCodes,
    BlockQuantizer,
    BlockScales,
    choose_block_scales,
    e2m1_codes,
    e2m1_round,
    e2m1_values,
    pack_nibbles,
    tensor_scale,
    unpack_nibbles,
)

FP4, FP8 = ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn


def test_all_sixteen_codes_are_those_of_the_format():
    codes = np.arange(16, dtype=np.uint8)
    assert e2m1_values(torch.from_numpy(codes)).numpy().tobytes() == codes.view(FP4).astype(np.float32).tobytes()


def test_ties_go_to_the_even_code_and_what_is_beyond_saturates():
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.5, 1e30, float("inf")]
    expected = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, 6.0, 6.0]
    assert e2m1_round(torch.tensor(ties)).tolist() == expected
    assert e2m1_round(-torch.tensor(ties)).tolist() == [-value for value in expected]


@given(st.lists(st.floats(width=32, allow_nan=False, min_value=-8, max_value=8), min_size=1, max_size=50))
@settings(max_examples=400, deadline=None)
def test_rounding_is_the_cast_of_ml_dtypes(values):
    """Value and code, the sign of zero included."""
    array = np.array(values, np.float32)
    # Neighbours of the ties, where a wrong rounding would show.
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], np.float32)
    array = np.concatenate([array, ties, np.nextafter(ties, np.float32(9)), np.nextafter(ties, np.float32(0))])
    expected, found = array.astype(FP4), e2m1_round(torch.from_numpy(array))
    assert found.numpy().tobytes() == expected.astype(np.float32).tobytes()
    assert np.array_equal(e2m1_codes(found).numpy(), expected.view(np.uint8))


def test_packing_keeps_every_pair():
    codes = torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8)
    packed = pack_nibbles(codes)
    assert packed.shape == (256, 1)
    assert packed[0x2B].item() == 0xB2  # the pair (2, 11): the first in the low half
    assert torch.equal(unpack_nibbles(packed), codes)


def by_hand(x: np.ndarray, tensor_scale: float) -> np.ndarray:
    """One block after the other, one number after the other."""
    result = np.empty_like(x)
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], BLOCK):
            block = x[row, start : start + BLOCK]
            scale = np.float32(min(np.float32(np.abs(block).max() / np.float32(6 * tensor_scale)), 448)).astype(FP8)
            step = np.float32(scale) * np.float32(tensor_scale)
            for column, value in enumerate(block):
                code = np.clip(value / step, -6, 6).astype(FP4) if step else FP4(0)
                result[row, start + column] = np.float32(code) * step
    return result


@pytest.mark.parametrize("tensor_scale", [2.0**-18, 2.0**-9, 2.0**-4, 8.0])
def test_activations_are_what_quantizing_by_hand_gives(tensor_scale):
    """Too small a tensor scale saturates blocks, too large a one makes them zero: all three cases are here."""
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 64)
    x[2, :16] = 0
    quantizer = BlockQuantizer(tensor_scale)
    assert np.array_equal(quantizer.fake(x).numpy(), by_hand(x.numpy(), tensor_scale))
    scales = quantizer.block_scales(x).float().repeat_interleave(BLOCK, 1) * tensor_scale
    assert torch.equal(e2m1_values(quantizer.codes(x)) * scales, quantizer.fake(x))


@given(st.floats(min_value=0.0, max_value=1e6, width=32))
@settings(max_examples=200, deadline=None)
def test_the_tensor_scale_is_the_smallest_power_of_two_that_reaches(amax):
    scale = tensor_scale(amax)
    assert Fraction(scale).numerator == 1 or Fraction(scale).denominator == 1
    assert np.log2(scale) == int(np.log2(scale))
    assert 2.0**-18 <= scale <= 2.0**15
    assert scale == 2.0**-18 or 6 * 448 * scale / 2 < amax
    assert 6 * 448 * scale >= amax


@pytest.mark.parametrize("scale", [0.0, -1.0, 0.3, 2.0**-19, 2.0**16, float("nan"), float("inf")])
def test_other_tensor_scales_are_refused(scale):
    with pytest.raises(ValueError, match="power of two"):
        BlockQuantizer(scale)


def weight(rows: int = 24, columns: int = 96) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    found = torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 0, rows)[:, None]
    found[3, 16:32] = 0
    return found


def test_searched_scales_are_the_best_of_all_scales():
    """Against all 126 positive E4M3 numbers, tried one by one in float64."""
    w = weight()
    scales = choose_block_scales(w)
    blocks = w.numpy().astype(np.float64).reshape(24, -1, BLOCK)
    every = np.arange(1, 0x7F, dtype=np.uint8).view(FP8).astype(np.float64) * scales.tensor
    errors = []
    for scale in every:
        rounded = np.clip(blocks / scale, -6, 6).astype(np.float32).astype(FP4).astype(np.float64) * scale
        errors.append(((rounded - blocks) ** 2).sum(-1))
    least = np.min(errors, 0)
    found = BlockCodes.of(w, scales).dequantize().numpy().astype(np.float64).reshape(24, -1, BLOCK)
    # fp32 sums choose among scales whose errors are equal but for rounding.
    np.testing.assert_allclose(((found - blocks) ** 2).sum(-1), least, rtol=1e-5, atol=1e-18)
    plain = BlockCodes.of(w, choose_block_scales(w, search=False)).dequantize()
    assert float((torch.from_numpy(found.reshape(24, -1)) - w).square().sum()) < 0.8 * float((plain - w).square().sum())


def test_weights_are_exact_products_in_single_and_half_precision():
    """Why tensor scales are powers of two: no engine's arithmetic can change a weight that FP16 has room for."""
    quantized = BlockCodes.of(weight(), choose_block_scales(weight()))
    values, scales = quantized.dequantize(), quantized.scales
    for row, column in ((0, 0), (5, 17), (23, 95)):
        code = float(e2m1_values(quantized.codes[row, column]))
        exact = Fraction(code) * Fraction(float(scales.block[row, column // BLOCK])) * Fraction(scales.tensor)
        assert Fraction(float(values[row, column])) == exact
    normal = values.abs() >= 2.0**-14
    assert torch.equal(values[normal].half().float(), values[normal])
    assert bool((scales.block.float() > 0).all())


def test_scales_that_are_no_positive_numbers_are_refused():
    for bad in (0x00, 0x7F, 0x81):
        block = torch.full((2, 1), bad, dtype=torch.uint8).view(torch.float8_e4m3fn)
        with pytest.raises(ValueError, match="positive"):
            BlockScales(block, 0.5)
    with pytest.raises(ValueError, match="E4M3"):
        BlockScales(torch.ones(2, 1), 0.5)


def test_it_is_a_precision():
    precision = Precision.parse("WNVFP4ANVFP4")
    assert precision == Precision(4, 4, Kind.NVFP4)
    assert str(precision) == "wnvfp4anvfp4"


def test_files_rebuild_the_model(tmp_path):
    quantized = quantized_family("timm-vit", kind=Kind.NVFP4)
    assert of_type(quantized.weights, BlockCodes)
    assert of_type(quantized.activations, BlockQuantizer)
    save_quantized(tmp_path / "model", quantized)
    again, pixels = load_quantized(tmp_path / "model"), random_pixels(family("timm-vit"), 3)
    with torch.no_grad():
        assert torch.equal(again(pixels), quantized(pixels))
    assert again.activations == quantized.activations
    for name, stored in of_type(quantized.weights, BlockCodes).items():
        other = again.weights[name]
        assert torch.equal(other.codes, stored.codes)
        assert other.scales.tensor == stored.scales.tensor
        assert torch.equal(other.scales.block.view(torch.uint8), stored.scales.block.view(torch.uint8))


def test_damage_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    quantized = quantized_family("timm-vit", kind=Kind.NVFP4)
    save_quantized(tmp_path / "model", quantized)
    path = tmp_path / "model" / "model.safetensors"
    tensors, name = load_file(path), next(iter(of_type(quantized.weights, BlockCodes)))
    for key, bad in (
        (f"{name}.weight", tensors[f"{name}.weight"].float()),
        (f"{name}.weight_scale", tensors[f"{name}.weight_scale"][:, :1].contiguous()),
        (f"{name}.weight_tensor_scale", torch.tensor(0.3)),
    ):
        save_file(tensors | {key: bad}, path)
        with pytest.raises(BadArtifactError):
            load_quantized(tmp_path / "model")


def test_a_block_quantizer_is_of_its_kind():
    assert BlockQuantizer(1.0).kind is Kind.NVFP4
