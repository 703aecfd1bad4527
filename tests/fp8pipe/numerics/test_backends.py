"""Each device's operations against one another and ml_dtypes; power-of-two scales are exact; poison stays poison."""

from __future__ import annotations

import hashlib
import shutil

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8pipe.numerics import backends
from fp8pipe.numerics.backends import backend
from fp8pipe.numerics.grids import E4M3, E5M2, Scale, power_of_two_scale, quantize
from fp8pipe.numerics.kinds import ScaleRule

CPU = backend(torch.empty(0))

GRIDS = {"e4m3": (E4M3, ml_dtypes.float8_e4m3fn), "e5m2": (E5M2, ml_dtypes.float8_e5m2)}


@pytest.fixture
def torch_only(monkeypatch):
    """Run the torch twin instead of the compiled kernels."""
    monkeypatch.setattr(backends, "library", lambda: None)


def _wide(seed: int, rows: int = 40, cols: int = 96) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(3.0 * torch.randn(rows, cols, generator=generator))
    return (torch.randn(rows, cols, generator=generator) * spread).to(torch.bfloat16)


def _reference(x: torch.Tensor, grid, dtype) -> np.ndarray:
    """Row by row in float64 and ml_dtypes: the cast as the text describes it."""
    rows = []
    for row in x.float().numpy().astype(np.float64):
        amax = max(np.abs(row).max(), 1e-12)
        scale = 2.0 ** np.floor(np.log2(grid.max / amax))
        rows.append((row * scale).astype(np.float32).astype(dtype).astype(np.float64) / scale)
    return np.stack(rows)


@pytest.mark.skipif(backends.library() is None, reason="no C compiler")
@pytest.mark.parametrize("name", GRIDS)
def test_compiled_cast_equals_ml_dtypes_bit_for_bit(name):
    grid, dtype = GRIDS[name]
    for seed in range(5):
        x = _wide(seed)
        values = CPU.cast(x, grid, ScaleRule.POWER_OF_TWO)
        assert np.array_equal(values.double().numpy(), _reference(x, grid, dtype))


@pytest.mark.parametrize("name", GRIDS)
def test_torch_cast_equals_ml_dtypes_bit_for_bit(name, torch_only):
    grid, dtype = GRIDS[name]
    for seed in range(5):
        x = _wide(seed)
        assert np.array_equal(CPU.cast(x, grid, ScaleRule.POWER_OF_TWO).double().numpy(), _reference(x, grid, dtype))


@pytest.mark.skipif(backends.library() is None, reason="no C compiler")
@pytest.mark.parametrize("grid", [E4M3, E5M2], ids=lambda g: g.name)
def test_both_casts_agree_on_every_bf16_value(grid, monkeypatch):
    # All 65,536 bf16 numbers, in rows of 256 that share an exponent range, so that subnormals of the grid occur too.
    x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(256, 256)
    compiled = CPU.cast(x, grid, ScaleRule.POWER_OF_TWO)
    monkeypatch.setattr(backends, "library", lambda: None)
    plain = CPU.cast(x, grid, ScaleRule.POWER_OF_TWO)
    both_nan = compiled.isnan() & plain.isnan()
    assert torch.equal(compiled.isnan(), plain.isnan())
    assert torch.equal(compiled.view(torch.int16)[~both_nan], plain.view(torch.int16)[~both_nan])


@pytest.mark.parametrize("native_on", [True, False])
def test_zero_rows_stay_zero_and_poison_spreads_over_its_row_alone(native_on, monkeypatch):
    if not native_on:
        monkeypatch.setattr(backends, "library", lambda: None)
    x = torch.ones(4, 8, dtype=torch.bfloat16)
    x[0] = 0
    x[1, 3] = float("nan")
    x[2, 3] = float("inf")
    values = CPU.cast(x, E4M3, ScaleRule.POWER_OF_TWO)
    assert torch.equal(values[0], torch.zeros(8, dtype=torch.bfloat16))
    assert values[1].isnan().all()
    assert values[2].isnan().all()
    assert torch.equal(values[3], x[3])


@pytest.mark.parametrize("native_on", [True, False])
def test_cast_writes_into_a_strided_destination_only(native_on, monkeypatch):
    if not native_on:
        monkeypatch.setattr(backends, "library", lambda: None)
    x = _wide(1, 6, 10)
    wide = torch.full((6, 16), 7.0, dtype=torch.bfloat16)
    CPU.cast(x, E5M2, ScaleRule.POWER_OF_TWO, out=wide[:, :10])
    assert torch.equal(wide[:, :10], CPU.cast(x, E5M2, ScaleRule.POWER_OF_TWO))
    assert (wide[:, 10:] == 7).all()


@pytest.mark.parametrize("native_on", [True, False])
def test_cast_reads_a_strided_source(native_on, monkeypatch):
    if not native_on:
        monkeypatch.setattr(backends, "library", lambda: None)
    wide = _wide(2, 6, 24)
    part = wide[:, 5:15]
    assert torch.equal(
        CPU.cast(part, E4M3, ScaleRule.POWER_OF_TWO), CPU.cast(part.contiguous(), E4M3, ScaleRule.POWER_OF_TWO)
    )


@given(st.floats(min_value=1e-12, max_value=3e38))
@settings(max_examples=300, deadline=None)
def test_power_of_two_scale_is_the_smallest_that_fits(amax):
    amax = float(np.float32(amax))
    scale = float(power_of_two_scale(torch.tensor(amax), E4M3))
    mantissa, _ = np.frexp(scale)
    assert mantissa == 0.5
    assert amax / scale <= 448.0 < amax / scale * 2


@pytest.mark.parametrize("native_on", [True, False])
def test_decoding_is_exact_for_all_codes(native_on, monkeypatch):
    if not native_on:
        monkeypatch.setattr(backends, "library", lambda: None)
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(16, 16).view(torch.float8_e4m3fn)
    for exponent in (-110, -100, -40, -9, 0, 20, 100):
        scale = torch.tensor(2.0**exponent)
        values = CPU.decode(codes, Scale(scale), torch.bfloat16)
        expected = codes.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64) * 2.0**exponent
        finite = np.isfinite(expected)
        assert np.array_equal(values.double().numpy()[finite], expected[finite])
        assert np.array_equal(values.isnan().numpy(), ~finite)


def test_scaling_a_weight_by_a_power_of_two_keeps_its_codes():
    w = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    codes, scale = quantize(w, E4M3, ScaleRule.POWER_OF_TWO)
    more_codes, more_scale = quantize(w * 8, E4M3, ScaleRule.POWER_OF_TWO)
    assert torch.equal(codes.view(torch.uint8), more_codes.view(torch.uint8))
    assert more_scale.value == scale.value * 8


@pytest.mark.skipif(backends.library() is None, reason="no C compiler")
def test_compiled_merge_rounds_every_sum_as_ml_dtypes_does():
    """All codes, each with updates of every size: exact ties, half the smallest subnormal, past saturation, NaN."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).repeat(64, 1)
    generator = torch.Generator().manual_seed(1)
    update = torch.randn(64, 256, generator=generator) * torch.logspace(-5, 3, 64).unsqueeze(1)
    update[0] = 0.0
    update[1:13] = (2.0 ** torch.arange(-10.0, 2.0)).unsqueeze(1)
    update[13, ::3] = torch.nan
    merged = torch.cat([codes, codes]).view(torch.float8_e4m3fn)
    rows = torch.arange(64).flip(0) * 2
    expected = merged.clone().view(torch.uint8).numpy()
    target = merged.float()[rows].numpy() + update.numpy()
    cast_target = np.clip(target, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    CPU.merge_rows(merged, rows, update)
    got = merged.view(torch.uint8).numpy()
    untouched = np.setdiff1d(np.arange(128), rows.numpy())
    assert np.array_equal(got[untouched], expected[untouched])
    result = got[rows.numpy()].view(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(np.isnan(result), np.isnan(target))
    known = ~np.isnan(target)
    assert np.array_equal(result.view(np.uint8)[known], cast_target.view(np.uint8)[known])


@pytest.mark.parametrize("native_on", [True, False])
def test_code_units_decode_exactly(native_on, monkeypatch):
    if not native_on:
        monkeypatch.setattr(backends, "library", lambda: None)
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn)
    expected = codes.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(CPU.decode_units(codes).numpy(), expected, equal_nan=True)


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_only_what_was_compiled_here_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("FP8PIPE_CACHE", str(tmp_path))
    built = backends._build("cc")
    whole, seal = built.read_bytes(), built.with_suffix(".sha256")
    made = seal.read_text()
    before = built.stat().st_mtime_ns
    assert backends._build("cc").stat().st_mtime_ns == before
    for spoil in (
        lambda: built.write_bytes(whole[:-1] + b"x"),
        lambda: seal.write_text("0" * 64),
        seal.unlink,
        lambda: built.chmod(0o666),
        lambda: (built.rename(tmp_path / "elsewhere"), built.symlink_to(tmp_path / "elsewhere")),
    ):
        spoil()
        again = backends._build("cc")
        assert not again.is_symlink()
        assert again.stat().st_mode & 0o022 == 0
        assert seal.read_text() == hashlib.sha256(again.read_bytes()).hexdigest()
    assert len(made) == 64
