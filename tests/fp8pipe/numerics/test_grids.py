"""Every code of every grid, and a million roundings, against oracles that share no code with ours."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from fp8pipe.numerics.grids import AMAX_FLOOR, E4M3, E5M2, FloatGrid, IntGrid, amax_scale_quant, dequantize

ML = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}
FLOAT_GRIDS = pytest.mark.parametrize("grid", [E4M3, E5M2], ids=lambda grid: grid.name)


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
    assert grid.is_nan(torch.from_numpy(ours).view(grid.dtype)).numpy()[nan].all()
    different = np.flatnonzero((ours != expected) & ~nan)
    assert different.size == 0, [(values[i], ours[i], expected[i]) for i in different[:5]]


@FLOAT_GRIDS
def test_table_is_the_specification_and_ml_dtypes(grid):
    table = grid.table().numpy()
    np.testing.assert_array_equal(table, [decode(code, grid) for code in range(256)])
    np.testing.assert_array_equal(table, np.arange(256, dtype=np.uint8).view(ML[grid.name]).astype(np.float32))
    # assert_array_equal takes -0.0 for 0.0
    assert math.copysign(1, table[0]) == 1
    assert math.copysign(1, table[128]) == -1


@FLOAT_GRIDS
def test_declared_limits_are_the_tables(grid):
    magnitudes = np.unique(np.abs(grid.table().numpy()))
    finite = magnitudes[np.isfinite(magnitudes) & (magnitudes > 0)]
    assert (finite[0], finite[-1]) == (grid.min_subnormal, grid.max)
    # Subnormals are evenly spaced up to the smallest normal: 2^m of them, zero included.
    assert finite[2**grid.mantissa_bits - 1] == grid.min_normal


def test_table_is_a_copy():
    E4M3.table()[0] = 5.0
    assert E4M3.table()[0] == 0.0


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
    exponents = generator.uniform(math.log2(grid.min_subnormal) - 3, math.log2(grid.max) + 1, 1_000_000)
    signs = generator.choice([-1.0, 1.0], exponents.size)
    assert_same_codes((signs * 2.0**exponents).astype(np.float32), grid)


@FLOAT_GRIDS
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ties_and_their_neighbours(grid, dtype):
    magnitudes = np.unique(np.abs(grid.table().numpy().astype(np.float64)))
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
    exponents = generator.uniform(math.log2(grid.min_subnormal) - 3, math.log2(grid.max) + 1, 100_000)
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
def test_amax_scale_maps_the_largest_value_to_the_top_code(grid):
    x = torch.tensor([[0.013, -3.7, 1.1], [2e-7, 1e-7, -5e-8]])
    scale_quant = amax_scale_quant(x.abs().amax(dim=1, keepdim=True), grid)
    codes = grid.quantize(x, scale_quant)
    assert codes.float().abs().amax(dim=1).tolist() == [grid.max, grid.max]
    # The largest values come back to within fp32 rounding of scale, product and reciprocal (3 half units).
    back = dequantize(codes, 1 / scale_quant)
    assert back[0, 1].item() == pytest.approx(-3.7, rel=3 * 2**-24)
    assert back[1, 0].item() == pytest.approx(2e-7, rel=3 * 2**-24)


@FLOAT_GRIDS
def test_amax_zero_has_a_finite_scale_and_zero_codes(grid):
    scale_quant = amax_scale_quant(torch.tensor(0.0), grid)
    assert scale_quant.item() == pytest.approx(grid.max / AMAX_FLOOR, rel=1e-6)
    assert grid.quantize(torch.zeros(4), scale_quant).float().tolist() == [0.0] * 4


def test_scales_divide_in_fp64():
    amax = torch.rand(10_000, generator=torch.Generator().manual_seed(1)) + 1e-3
    expected = (np.float64(448.0) / amax.numpy().astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(amax_scale_quant(amax, E4M3).numpy(), expected)


INT_GRIDS = pytest.mark.parametrize(
    "grid",
    [
        pytest.param(IntGrid(bits, **kind), id=f"{name}{bits}")
        for bits in range(2, 9)
        for name, kind in (("int", {}), ("narrow", {"narrow": True}), ("uint", {"signed": False}))
    ],
)


@INT_GRIDS
def test_integer_limits(grid):
    values = sorted(
        (code - 2**grid.bits if grid.signed and code >= 2 ** (grid.bits - 1) else code) for code in range(2**grid.bits)
    )[int(grid.narrow) :]
    assert (grid.min, grid.max) == (values[0], values[-1])
    assert not grid.narrow or grid.min == -grid.max
    name = f"{'' if grid.signed else 'u'}int{grid.bits}"
    if hasattr(ml_dtypes, name) and not grid.narrow:
        info = ml_dtypes.iinfo(getattr(ml_dtypes, name))
        assert (grid.min, grid.max) == (info.min, info.max)


@INT_GRIDS
@pytest.mark.parametrize("zero_point", [0, 1])
def test_every_integer_code_survives_a_round_trip(grid, zero_point):
    scale_dequant = torch.tensor(0.0371)
    codes = torch.arange(grid.min, grid.max + 1).to(grid.dtype)
    values = grid.dequantize(codes, scale_dequant, zero_point)
    expected = (np.arange(grid.min, grid.max + 1) - zero_point).astype(np.float32) * np.float32(0.0371)
    np.testing.assert_array_equal(values.numpy(), expected)
    assert torch.equal(grid.quantize(values, scale_dequant, zero_point), codes)


@INT_GRIDS
def test_integer_rounding_is_to_even_and_saturates(grid):
    # Halves and quarters are exact, so Python's round (ties to even) is an independent oracle.
    values = [quarter / 4 for quarter in range(-4 * 300, 4 * 300 + 1)] + [math.inf, -math.inf]
    expected = [min(max(round(value) if math.isfinite(value) else value, grid.min), grid.max) for value in values]
    assert grid.quantize(torch.tensor(values), torch.tensor(1.0)).tolist() == expected


def test_integers_refuse_nan_and_impossible_grids():
    with pytest.raises(ValueError, match="NaN"):
        IntGrid(4).quantize(torch.tensor([math.nan]), torch.tensor(1.0))
    for bits in (1, 9):
        with pytest.raises(ValueError, match="2 to 8 bits"):
            IntGrid(bits)
    with pytest.raises(ValueError, match="unsigned"):
        IntGrid(4, signed=False, narrow=True)


def test_dequantize_is_one_scale_a_row_or_one_a_tensor():
    codes = torch.tensor([[1.0, -2.0], [448.0, 0.5]]).to(torch.float8_e4m3fn)
    per_row = dequantize(codes, torch.tensor([[0.5], [2.0]]))
    assert per_row.tolist() == [[0.5, -1.0], [896.0, 1.0]]
    assert dequantize(codes, torch.tensor(0.25)).tolist() == [[0.25, -0.5], [112.0, 0.125]]
