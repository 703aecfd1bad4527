"""The plugin's arithmetic for NVFP4, without vLLM: codes and scales against ml_dtypes, fused parts, refusals."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from fp8pipe_vllm_cpu.dequantize import UNSET_SCALE, dequantize_nvfp4, largest_of_parts, round_trip_nvfp4

from fp8pipe.numerics.plain_nvfp4 import round_nvfp4

FP4, FP8 = ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn
SCALES = np.arange(1, 0x7F, dtype=np.uint8)  # every positive E4M3 number


def stored() -> tuple[torch.Tensor, torch.Tensor]:
    """One row per scale, with all sixteen codes in order."""
    codes = np.arange(16, dtype=np.uint8)
    packed = np.tile(codes[::2] | codes[1::2] << 4, (len(SCALES), 1))
    return torch.from_numpy(packed), torch.from_numpy(SCALES.copy())[:, None].view(torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divisors", [[512.0], [0.25, 0.25], [0.25, 512.0], [512.0, UNSET_SCALE]])
def test_every_code_times_every_scale_by_the_largest_divisor(dtype: torch.dtype, divisors: list[float]) -> None:
    """As vLLM's kernels do; of a layer that is fused in the checkpoint, vLLM may load its one divisor once only."""
    packed, scale = stored()
    exact = np.arange(16, dtype=np.uint8).view(FP4).astype(np.float64) * SCALES.view(FP8).astype(np.float64)[:, None]
    found = dequantize_nvfp4(packed, scale, torch.tensor(divisors), dtype)
    assert found.dtype == dtype
    assert np.array_equal(found.double().numpy(), exact / max(divisors))
    assert np.array_equal(np.signbit(found.float().numpy()), np.signbit(exact))


@pytest.mark.parametrize("factors", [[2.0**-9], [2.0**-9, 2.0**-9], [4.0, 2.0**-9], [2.0**-9, UNSET_SCALE]])
def test_factors_multiply_and_are_the_reciprocals_of_divisors(factors: list[float]) -> None:
    """As ModelOpt stores them, bit for bit: all codes, scales, and powers of two."""
    packed, scale = stored()
    exact = np.arange(16, dtype=np.uint8).view(FP4).astype(np.float64) * SCALES.view(FP8).astype(np.float64)[:, None]
    found = dequantize_nvfp4(packed, scale, torch.tensor(factors), divides=False)
    assert np.array_equal(found.double().numpy(), exact * max(factors))
    for power in range(-18, 9):
        factor = dequantize_nvfp4(packed, scale, torch.tensor([2.0**power]), divides=False)
        divisor = dequantize_nvfp4(packed, scale, torch.tensor([2.0**-power]))
        assert torch.equal(factor.view(torch.int32), divisor.view(torch.int32))


@pytest.mark.parametrize(
    ("divisors", "code", "why"),
    [
        ([UNSET_SCALE, 1.0], None, "no scale for part"),
        ([0.0, 1.0], None, "zero, negative or not finite"),
        ([float("nan"), 1.0], None, "zero, negative or not finite"),
        ([1.0, 1.0], 0x00, "missing, zero"),
        ([1.0, 1.0], 0x7F, "NaN"),
        ([1.0, 1.0], 0x88, "negative"),
    ],
)
def test_scales_that_are_missing_or_no_positive_numbers_are_refused(
    divisors: list[float], code: int | None, why: str
) -> None:
    packed, scale = stored()
    if code is not None:
        scale.view(torch.uint8)[3, 0] = code
    with pytest.raises(ValueError, match=why):
        dequantize_nvfp4(packed, scale, torch.tensor(divisors))


def test_block_scales_of_another_shape_are_refused() -> None:
    packed, scale = stored()
    with pytest.raises(ValueError, match="expected block scales"):
        dequantize_nvfp4(packed, scale.repeat(1, 2), torch.tensor([1.0]))


def rounded_by_ml_dtypes(x: torch.Tensor, divisor: float) -> np.ndarray:
    """Blocks of 16 rounded in float64 by the format's definition."""
    blocks = x.double().numpy().reshape(-1, 16)
    scale = np.minimum(np.abs(blocks).max(1, keepdims=True) * divisor / 6, 448).astype(FP8).astype(np.float64)
    quotients = np.divide(blocks * divisor, scale, out=np.zeros_like(blocks), where=scale > 0)
    return (np.clip(quotients, -6, 6).astype(FP4).astype(np.float64) * scale / divisor).reshape(x.shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("divisor", [2.0**-8, 1.0, 64.0, 2.0**18])
def test_inputs_are_rounded_as_the_format_defines(dtype: torch.dtype, divisor: float) -> None:
    """Inputs from far below the smallest block scale to twice the range of the global scale, and blocks of zeros."""
    x = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    x = (x * torch.logspace(-8, 3.5, 24)[:, None] / divisor * 16).to(dtype)
    x[3, :16] = 0
    exact = rounded_by_ml_dtypes(x, divisor)
    for found in (round_trip_nvfp4(x, torch.tensor(divisor)), round_nvfp4(x, divisor)):
        assert found.dtype == dtype
        assert np.array_equal(found.double().numpy(), exact)
    assert np.count_nonzero(exact[3, :16]) == 0
    assert np.abs(exact).max() == 6 * 448 / divisor  # saturated


def test_global_scales_of_inputs_that_are_missing_are_refused() -> None:
    assert float(largest_of_parts(torch.tensor([2.0, 8.0]))) == 8
    for wrong in (UNSET_SCALE, 0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"global scale|no scale"):
            largest_of_parts(torch.tensor([wrong]))
    with pytest.raises(ValueError, match="blocks of 16"):
        round_trip_nvfp4(torch.ones(2, 24), torch.tensor(1.0))
