"""The codec against ml_dtypes' E4M3, compressed-tensors' own quantizer, and its own promises."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fp8pipe.numerics.grids import (
    channel_scale,
    dequantize_weight,
    quantize_weight,
    relative_error,
    same_bits,
    to_bf16,
)

MATRICES = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
    elements=st.floats(-(2.0**40), 2.0**40, width=32, allow_subnormal=False),
)


@settings(max_examples=200, deadline=None)
@given(values=MATRICES, transposed=st.booleans())
def test_round_trip_stays_within_half_a_step(values: np.ndarray, transposed: bool) -> None:
    weight = torch.from_numpy(values)
    codes, scale = quantize_weight(weight, transposed=transposed)
    back = dequantize_weight(codes, scale, transposed=transposed)
    assert back.shape == weight.shape
    assert back.dtype == torch.float32
    assert not torch.isnan(codes.float()).any()
    per_element = scale.reshape(1, -1) if transposed else scale
    # Half a step: 2^-4 relative for normals, 2^-10 code units below them; 1e-6 for fp32 rounding.
    bound = torch.maximum(weight.abs() * 2.0**-4, per_element * 2.0**-10) * (1 + 1e-6)
    assert ((back - weight).abs() <= bound).all()


@settings(max_examples=200, deadline=None)
@given(values=MATRICES)
def test_quantizing_twice_changes_nothing(values: np.ndarray) -> None:
    first = dequantize_weight(*quantize_weight(torch.from_numpy(values)))
    second = dequantize_weight(*quantize_weight(first))
    # The row maximum sits on code 448 of both, so both share a scale up to one rounding of the division.
    torch.testing.assert_close(second, first, rtol=2e-7, atol=0.0)


@settings(max_examples=100, deadline=None)
@given(values=MATRICES)
def test_transposed_is_the_transpose(values: np.ndarray) -> None:
    weight = torch.from_numpy(values)
    codes, scale = quantize_weight(weight)
    codes_t, scale_t = quantize_weight(weight.t().contiguous(), transposed=True)
    assert same_bits(codes.t(), codes_t)
    assert same_bits(scale, scale_t)


def test_codes_equal_those_of_two_other_implementations() -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 80) * torch.logspace(-6, 3, 48).reshape(-1, 1)
    codes, scale = quantize_weight(weight)
    by_numpy = (weight.numpy() / scale.numpy()).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(codes.view(torch.uint8).numpy(), by_numpy.view(np.uint8))
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(num_bits=8, type="float", strategy="channel", symmetric=True),
    )
    compressor = BaseCompressor.get_value_from_registry("float-quantized")
    theirs = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
    assert same_bits(theirs["weight"], codes)
    back = compressor.decompress({"weight": codes, "weight_scale": scale}, scheme)
    assert same_bits(back["weight"], dequantize_weight(codes, scale))


def test_every_code_survives_the_repeated_scale() -> None:
    table = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)
    codes = table[~torch.isnan(table.float())].reshape(2, 127)
    scalar = torch.tensor(0.0371)
    repeated = channel_scale(scalar, 2)
    assert repeated.shape == (2, 1)
    assert same_bits(dequantize_weight(codes, repeated), dequantize_weight(codes, scalar))
    flipped = codes.t().contiguous()
    assert same_bits(dequantize_weight(flipped, repeated, transposed=True), codes.t().float() * scalar)


def test_channel_scale_refuses_what_it_does_not_understand() -> None:
    with pytest.raises(ValueError, match="float32"):
        channel_scale(torch.ones((), dtype=torch.bfloat16), 4)
    for shape in [(4,), (1, 4), (3, 1)]:
        with pytest.raises(ValueError, match="scale is"):
            channel_scale(torch.ones(shape), 4)


def test_zero_rows_and_inputs_are_left_alone() -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, -2.0]])
    before = weight.clone()
    codes, scale = quantize_weight(weight)
    assert torch.equal(weight, before)
    assert (scale > 0).all()
    assert torch.equal(dequantize_weight(codes, scale)[0], torch.zeros(2))


def test_same_bits_tells_signs_of_zero_and_accepts_nan() -> None:
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, 1))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16))


def test_relative_error_and_bf16() -> None:
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0.0
    assert relative_error(torch.tensor([3.0]), torch.tensor([4.0])) == pytest.approx(0.25)
    # 1 + 2^-8 lies halfway between two bf16 values: ties go to the even one.
    assert to_bf16(torch.tensor([1.0 + 2.0**-8])).float().item() == 1.0
