"""Every code of every grid, and a million roundings, against oracles that share no code with ours."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from breadth import usual

from fp8pipe.numerics.grids import (
    AMAX_FLOOR,
    E4M3,
    E5M2,
    FloatGrid,
    amax_scale,
    power_of_two_scale,
    quantize,
    quantize_stacked,
    row_blocks,
    same_bits,
)
from fp8pipe.numerics.kinds import ScaleRule

ML = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
SMALLEST = {"e4m3": 2.0**-9, "e5m2": 2.0**-16}
FLOAT_GRIDS = pytest.mark.parametrize("grid", [E4M3, E5M2], ids=lambda grid: grid.name)


def table(grid: FloatGrid) -> np.ndarray:
    """All 256 codes decoded by torch."""
    return torch.arange(256, dtype=torch.int32).to(torch.uint8).view(grid.dtype).float().numpy()


def decode(code: int, grid: FloatGrid) -> float:
    """One byte by the letter of the OCP specification."""
    mantissa_bits, bias = {"e4m3": (3, 7), "e5m2": (2, 15)}[grid.name]
    exponent_bits = 7 - mantissa_bits
    sign = -1.0 if code & 0x80 else 1.0
    exponent = (code >> mantissa_bits) & (2**exponent_bits - 1)
    mantissa = code & (2**mantissa_bits - 1)
    if grid.name == "e4m3" and exponent == 15 and mantissa == 7:
        return math.nan
    if grid.name == "e5m2" and exponent == 31:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)


def reference_cast(values: np.ndarray, grid: FloatGrid) -> np.ndarray:
    """The right codes, as bytes.

    fp32: ml_dtypes' cast, with saturation done for it. fp64: ml_dtypes goes by way of fp32 and rounds twice,
    so the nearest entry of the decoded table is looked up, whose midpoints are exact in fp64.
    """
    if values.dtype == np.float32:
        return np.clip(values, -grid.max, grid.max).astype(ML[grid.name]).view(np.uint8)
    magnitudes = np.array([decode(code, grid) for code in range(128)])
    magnitudes = magnitudes[np.isfinite(magnitudes)]  # ascending, and the index is the code
    midpoints = (magnitudes[1:] + magnitudes[:-1]) / 2
    below = np.searchsorted(midpoints, np.abs(values), "left")
    above = np.searchsorted(midpoints, np.abs(values), "right")
    even = np.where(below % 2 == 0, below, above)  # the two differ at a tie only
    return (even + 128 * np.signbit(values)).astype(np.uint8)


def assert_same_codes(values: np.ndarray, grid: FloatGrid) -> None:
    ours = grid.cast(torch.from_numpy(values)).view(torch.uint8).numpy()
    expected = reference_cast(values, grid)
    nan = np.isnan(values)
    assert np.isnan(table(grid)[ours[nan]]).all()
    different = np.flatnonzero((ours != expected) & ~nan)
    assert different.size == 0, [(values[i], ours[i], expected[i]) for i in different[:5]]


@FLOAT_GRIDS
def test_table_is_the_specification_and_ml_dtypes(grid):
    decoded = table(grid)
    np.testing.assert_array_equal(decoded, [decode(code, grid) for code in range(256)])
    np.testing.assert_array_equal(decoded, np.arange(256, dtype=np.uint8).view(ML[grid.name]).astype(np.float32))
    # assert_array_equal takes -0.0 for 0.0
    assert math.copysign(1, decoded[0]) == 1
    assert math.copysign(1, decoded[128]) == -1


@FLOAT_GRIDS
def test_declared_limits_are_the_tables(grid):
    magnitudes = np.unique(np.abs(table(grid)))
    finite = magnitudes[np.isfinite(magnitudes) & (magnitudes > 0)]
    assert (finite[0], finite[-1]) == (SMALLEST[grid.name], grid.max)
    # Subnormals are evenly spaced up to the smallest normal: 2^m of them, zero included.
    assert finite[2**grid.mantissa_bits - 1] == grid.min_normal


@FLOAT_GRIDS
def test_every_finite_code_survives_a_round_trip(grid):
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(grid.dtype)
    finite = torch.isfinite(codes.float())
    back = grid.cast(codes.float())
    assert torch.equal(back.view(torch.uint8)[finite], codes.view(torch.uint8)[finite])
    # FP8 -> bf16 -> FP8: every code is exact in bf16.
    assert torch.equal(codes.to(torch.bfloat16).float()[finite], codes.float()[finite])
    through = grid.cast(codes.to(torch.bfloat16))
    assert torch.equal(through.view(torch.uint8)[finite], codes.view(torch.uint8)[finite])


@FLOAT_GRIDS
def test_a_million_values_round_as_ml_dtypes(grid):
    generator = np.random.default_rng(7)
    # From well below the smallest subnormal's half to twice the maximum, evenly in the logarithm.
    exponents = generator.uniform(math.log2(SMALLEST[grid.name]) - 3, math.log2(grid.max) + 1, 1_000_000)
    signs = generator.choice([-1.0, 1.0], exponents.size)
    assert_same_codes((signs * 2.0**exponents).astype(np.float32), grid)


@FLOAT_GRIDS
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ties_and_their_neighbours(grid, dtype):
    magnitudes = np.unique(np.abs(table(grid).astype(np.float64)))
    magnitudes = magnitudes[np.isfinite(magnitudes)]
    ties = ((magnitudes[1:] + magnitudes[:-1]) / 2).astype(dtype)
    points = np.concatenate([ties, np.nextafter(ties, dtype(0)), np.nextafter(ties, dtype(np.inf))])
    assert_same_codes(np.concatenate([points, -points]), grid)
    # The tie itself goes to the even code, said without ml_dtypes.
    codes = grid.cast(torch.from_numpy(ties)).view(torch.uint8)
    assert (codes % 2 == 0).all()


@FLOAT_GRIDS
def test_fp64_is_rounded_once(grid):
    generator = np.random.default_rng(3)
    exponents = generator.uniform(math.log2(SMALLEST[grid.name]) - 3, math.log2(grid.max) + 1, 100_000)
    assert_same_codes(2.0**exponents, grid)
    # By way of fp32 this would become the tie 1 + half a step, and go down to the even 1.
    step = 2.0**-grid.mantissa_bits
    assert grid.cast(torch.tensor([1 + step / 2 + 1e-12], dtype=torch.float64)).float().item() == 1 + step


@FLOAT_GRIDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_special_values(grid, dtype):
    values = torch.tensor([math.inf, -math.inf, 6e4, -6e4, 0.0, -0.0, math.nan], dtype=dtype)
    cast = grid.cast(values).float()
    top = grid.max
    assert cast[:6].tolist() == [top, -top, top, -top, 0.0, 0.0]
    assert torch.signbit(cast[4:6]).tolist() == [False, True]
    assert cast[6].isnan()


@FLOAT_GRIDS
def test_cast_leaves_its_input_alone(grid):
    values = torch.tensor([1e9, -1e9])
    grid.cast(values)
    assert values.tolist() == [1e9, -1e9]


@FLOAT_GRIDS
@pytest.mark.parametrize("rule", ScaleRule)
def test_the_largest_value_of_each_row_reaches_the_top_of_the_grid(rule, grid):
    x = torch.tensor([[0.013, -3.7, 1.1], [2e-7, 1e-7, -5e-8]])
    codes, scale = quantize(x, grid, rule, per_row=True)
    assert scale.rule is rule
    tops = codes.float().abs().amax(dim=1)
    assert (tops == grid.max).all() if rule is ScaleRule.EXACT else (tops >= grid.max / 2).all()
    back = scale.dequantize(codes)
    # The direction that is stored; `exact`: three fp32 roundings, of multiplier, product and quotient.
    torch.testing.assert_close(codes.float() * scale.value, back, rtol=2**-23, atol=0)
    rel = 3 * 2**-24 if rule is ScaleRule.EXACT else 2 ** -(grid.mantissa_bits + 1)
    assert back[0, 1].item() == pytest.approx(-3.7, rel=rel)
    assert back[1, 0].item() == pytest.approx(2e-7, rel=rel)


@FLOAT_GRIDS
def test_amax_zero_has_a_positive_scale_and_zero_codes(grid):
    assert amax_scale(torch.tensor(0.0), grid).item() == pytest.approx(AMAX_FLOOR / grid.max, rel=1e-6)
    for rule in ScaleRule:
        codes, scale = quantize(torch.zeros(2, 2), grid, rule)
        assert scale.value > 0
        assert not codes.float().any()


@FLOAT_GRIDS
def test_an_amax_just_above_the_floor_has_a_scale_of_its_own(grid):
    above, below = (amax_scale(torch.tensor(amax), grid).item() * grid.max for amax in (1.5e-12, 0.5e-12))
    assert above == pytest.approx(1.5e-12, rel=1e-6)
    assert below == pytest.approx(1e-12, rel=1e-6)


def test_scales_divide_in_fp64():
    amax = torch.rand(10_000, generator=torch.Generator().manual_seed(1)) + 1e-3
    wide = amax.numpy().astype(np.float64)
    np.testing.assert_array_equal(amax_scale(amax, E4M3).numpy(), (wide / np.float64(448.0)).astype(np.float32))
    _, scale = quantize(amax.view(-1, 1), E4M3, ScaleRule.EXACT, per_row=True)
    inverse = (np.float64(448.0) / wide).astype(np.float32)
    np.testing.assert_array_equal(scale.inverse_scale.numpy()[:, 0], inverse)
    stored = (1 / inverse.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(scale.value.numpy()[:, 0], stored)


def _scale_by_frexp(amax: torch.Tensor, grid) -> torch.Tensor:
    """The same scale from float64 quotients, with not a bit of integer arithmetic."""
    ratio = grid.max / amax.double().clamp(min=1e-12)
    scale = torch.ldexp(torch.ones_like(ratio), 1 - torch.frexp(ratio).exponent)
    return torch.where(torch.isfinite(amax), scale, torch.nan).float()


def _same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """NaN where NaN is expected, of any bits, and the same bits elsewhere."""
    assert torch.equal(found.isnan(), expected.isnan())
    assert same_bits(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("grid", [E4M3, E5M2], ids=lambda g: g.name)
def test_scales_by_exponent_bits_are_those_of_float64_quotients(grid):
    """Every exponent, zeros, subnormals, infinity and NaN included, with mantissas at the edges and drawn ones."""
    edges = [0, 1, 2, 0x5FFFFF, 0x600000, 0x600001, 0x7FFFFE, 0x7FFFFF, 0x0CBCCB, 0x0CBCCC, 0x0CBCCD]  # 448, 1e-12
    drawn = torch.randint(1 << 23, (usual(2000, long=1 << 17),), generator=torch.Generator().manual_seed(0))
    mantissas = torch.cat([torch.tensor(edges), drawn]).to(torch.int32)
    amax = (torch.arange(256, dtype=torch.int32).unsqueeze(1) << 23 | mantissas).view(torch.float32)
    _same(power_of_two_scale(amax, grid), _scale_by_frexp(amax, grid))
    negative = -amax[-1, 1:]  # a NaN has either sign
    _same(power_of_two_scale(negative, grid), _scale_by_frexp(negative, grid))
    for one in (0.0, 448.0, float("inf")):
        _same(power_of_two_scale(torch.tensor(one), grid), _scale_by_frexp(torch.tensor(one), grid))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.float64])
def test_bits_are_the_same_or_not_whatever_the_width(dtype):
    zero = torch.zeros(3).to(dtype)
    assert same_bits(zero, zero.clone())
    assert not same_bits(zero, torch.ones(3).to(dtype))
    if dtype.is_floating_point:
        assert not same_bits(zero, torch.full((3,), -0.0).to(dtype))


@pytest.mark.parametrize("rule", ScaleRule)
def test_stacked_matrices_share_the_scale_of_their_largest_value(rule, monkeypatch):
    """In blocks of rows, too: the same as of one matrix that holds them all."""
    monkeypatch.setattr("fp8pipe.numerics.grids._BLOCK_VALUES", 16)
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.randn(rows, 8, generator=generator) * size for rows, size in ((3, 1.0), (5, 20.0), (2, 0.1))]
    assert len(row_blocks(matrices[1])) > 1
    codes, scale = quantize_stacked(matrices, E4M3, rule)
    whole, one = quantize(torch.cat(matrices), E4M3, rule)
    assert (codes.view(torch.uint8) == whole.view(torch.uint8)).all()
    assert scale == one
