"""Grids of weights and activations: against ml_dtypes and plain integer arithmetic; what is refused."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.numerics.kinds import Kind, Precision
from fp8pipe.numerics.quantizers import (
    SMALLEST_SCALE,
    ActivationQuantizer,
    WeightCodes,
    nearest_codes,
    storable_scale,
    weight_limits,
)

FP32 = st.floats(min_value=2.0**-20, max_value=64.0, width=32)


def _values(seed: int = 0, count: int = 4096) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator) * 3.0


@given(scale=FP32, low=st.integers(-128, 0), high=st.integers(1, 127))
@settings(max_examples=60, deadline=None)
def test_codes_are_those_of_the_formula_in_numpy(scale, low, high):
    x = torch.cat([_values(), torch.arange(-6.0, 6.0, 0.5) * scale, torch.tensor([0.0, -0.0, 1e30, -1e30])])
    quantizer = ActivationQuantizer(scale, low, high)
    expected = np.clip(np.rint(x.numpy() / np.float32(scale)), low, high)
    codes = quantizer.codes(x)
    assert codes.dtype == torch.int8
    assert np.array_equal(codes.numpy(), expected)
    assert np.array_equal(quantizer.dequantize(codes).numpy(), expected.astype(np.float32) * np.float32(scale))
    assert torch.equal(quantizer.fake(x), quantizer.dequantize(codes))
    assert torch.equal(quantizer.fake(quantizer.fake(x)), quantizer.fake(x))  # a grid point stays where it is
    assert len(codes.unique()) <= quantizer.levels == high - low + 1


def test_ties_go_to_the_even_code():
    quantizer = ActivationQuantizer(0.5, -8, 7)
    assert quantizer.codes(torch.tensor([0.25, 0.75, 1.25, -0.25, -0.75])).tolist() == [0, 2, 2, 0, -2]


@pytest.mark.parametrize("bits", range(2, 8))
def test_an_asymmetric_grid_equals_one_with_a_zero_point(bits):
    """round(x/s) + z on 0..2^k-1, dequantized by s (q - z): the same values as low = -z, high = 2^k - 1 - z."""
    scale, x = 0.173, _values(bits)
    scale = float(np.float32(scale))
    for zero in (0, 1, 2 ** (bits - 1), 2**bits - 1):
        codes = np.clip(np.rint(x.numpy() / np.float32(scale)) + zero, 0, 2**bits - 1)
        plain = ((codes - zero) * np.float32(scale)).astype(np.float32)
        assert np.array_equal(ActivationQuantizer(scale, -zero, 2**bits - 1 - zero).fake(x).numpy(), plain)


def test_fp8_activations_are_those_of_ml_dtypes():
    x = _values() * 100
    quantizer = ActivationQuantizer(0.25, kind=Kind.E4M3)
    expected = np.clip(x.numpy() / np.float32(0.25), -448, 448).astype(ml_dtypes.float8_e4m3fn)
    codes = quantizer.codes(x)
    assert np.array_equal(codes.view(torch.uint8).numpy(), expected.view(np.uint8))
    assert np.array_equal(quantizer.fake(x).numpy(), expected.astype(np.float32) * np.float32(0.25))


@pytest.mark.parametrize(
    "arguments",
    [(0.0,), (-1.0,), (float("nan"),), (float("inf"),), (0.1,), (1.0, -129, 127), (1.0, 1, 5), (1.0, 0, 0)],
    ids=["zero", "negative", "nan", "inf", "not fp32", "below int8", "without zero", "one level"],
)
def test_quantizers_no_runtime_could_run_are_refused(arguments):
    with pytest.raises(ValueError, match=r"scale|codes"):
        ActivationQuantizer(*arguments)


@pytest.mark.parametrize("bits", range(2, 9))
def test_weight_codes_round_each_channel_by_its_own_scale(bits):
    weight = _values(bits, 6 * 40).view(6, 10, 2, 2) * torch.logspace(-2, 1, 6).view(-1, 1, 1, 1)
    low, high = weight_limits(bits)
    scale = weight.abs().amax((1, 2, 3)) / high
    quantized = WeightCodes.of(weight, scale, bits)
    expected = np.clip(np.rint(weight.numpy() / scale.numpy().reshape(-1, 1, 1, 1)), low, high)
    assert np.array_equal(quantized.codes.numpy(), expected)
    assert len(quantized.codes.unique()) <= 2**bits
    assert (low, high) == (max(-(2 ** (bits - 1)), -127), 2 ** (bits - 1) - 1)
    # Inside the range no weight moves by more than half a step; one unit of fp32 for the division.
    limit = (scale / 2 * (1 + 1e-6)).view(-1, 1, 1, 1)
    assert ((quantized.dequantize() - weight).abs() <= limit).all()


def test_scaling_and_permuting_channels_commute_with_weight_codes():
    weight, scale = _values(1, 60).view(5, 12), torch.rand(5) + 0.1
    order = torch.tensor([3, 0, 4, 1, 2])
    plain = WeightCodes.of(weight, scale, 4)
    assert torch.equal(WeightCodes.of(weight * 4, scale * 4, 4).codes, plain.codes)
    assert torch.equal(WeightCodes.of(weight[order], scale[order], 4).codes, plain.codes[order])


@pytest.mark.parametrize(("text", "expected"), [("w4a8", (4, 8)), ("W2A2", (2, 2)), ("w8a8", (8, 8))])
def test_precisions_are_read(text, expected):
    precision = Precision.parse(text)
    assert (precision.weight_bits, precision.activation_bits, precision.kind) == (*expected, Kind.INT)
    assert str(precision) == text.lower()


def test_fp8_is_a_precision():
    assert Precision.parse("wfp8afp8") == Precision(8, 8, Kind.E4M3)
    assert str(Precision.parse("wfp8afp8")) == "wfp8afp8"


@pytest.mark.parametrize("text", ["w1a8", "w9a8", "w4a1", "w4", "a8w4", "", "w4a16", "w-4a4"])
def test_other_precisions_are_refused(text):
    with pytest.raises(ConfigurationError) as caught:
        Precision.parse(text)
    assert caught.value.exit_code == 10


@given(st.floats(min_value=0.0, max_value=70000.0, width=32))
@settings(max_examples=300, deadline=None)
def test_a_storable_scale_is_the_nearest_of_half_precision(scale):
    found = storable_scale(torch.tensor(scale))
    assert found.dtype == torch.float32
    assert float(np.float16(float(found))) == float(found)
    wanted = np.float32(min(max(scale, SMALLEST_SCALE), 65504.0))
    assert float(found) == float(np.float16(wanted))
    # 11 bits for normal numbers, 6 at the smallest.
    assert abs(float(found) - wanted) <= wanted * (2.0**-11 if wanted >= 2.0**-14 else 2.0**-7)


def test_integer_rounding_is_to_even_and_saturates():
    # Halves and quarters are exact, so Python's round (ties to even) is an independent oracle.
    values = [quarter / 4 for quarter in range(-4 * 300, 4 * 300 + 1)] + [1e30, -1e30, math.inf, -math.inf]
    for low, high in (weight_limits(4), (-128, 127), (0, 15)):
        expected = [min(max(round(value) if math.isfinite(value) else value, low), high) for value in values]
        assert nearest_codes(torch.tensor(values), low, high).tolist() == expected


def test_codes_of_e4m3_are_those_of_ml_dtypes_and_are_254():
    quantizer = ActivationQuantizer(0.5, kind=Kind.E4M3)
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert quantizer.levels == np.isfinite(every).sum()
    weight, scale = _values().view(64, 64), torch.linspace(0.01, 2.0, 64)
    held = WeightCodes.of(weight, scale, 8, Kind.E4M3)
    expected = (weight.numpy() / scale.numpy()[:, None]).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    assert (held.codes.view(torch.uint8).numpy() == expected.view(np.uint8)).all()
    assert (held.scale, held.bits, held.kind) == (pytest.approx(scale), 8, Kind.E4M3)
