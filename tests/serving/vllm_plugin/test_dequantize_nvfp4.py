"""The plugin's arithmetic for NVFP4, without vLLM: codes and scales against ml_dtypes, fused parts, refusals."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from fp8pipe_vllm_cpu.dequantize import UNSET_SCALE, dequantize_nvfp4

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
