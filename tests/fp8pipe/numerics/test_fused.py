"""Which kernels a CUDA device gets: those that were found right there, and torch's operators otherwise."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from fp8pipe.numerics import fused
from fp8pipe.numerics.grids import E4M3, E5M2, amax_scale, quantize
from fp8pipe.numerics.kinds import ScaleRule


def rows_by_torch(x, grid):
    codes, scale = quantize(x, grid, ScaleRule.POWER_OF_TWO, per_row=True)
    return codes, scale.value


def kernels(quantize_rows=rows_by_torch, transpose_bytes=lambda codes: codes.t().contiguous()):
    return SimpleNamespace(quantize_rows=quantize_rows, transpose_bytes=transpose_bytes)


def through_bf16(x, grid):
    """Scales of the other rule: quotients are no longer exact, and neither are their codes."""
    scale = amax_scale(x.abs().amax(1, keepdim=True).float(), grid)
    return grid.cast((x.float() / scale).bfloat16().float()), scale


def one_code_off(x, grid):
    codes, scale = rows_by_torch(x, grid)
    codes = codes.clone()
    codes.view(torch.uint8)[-1, -1] ^= 1
    return codes, scale


def loses_nan(x, grid):
    """As a maximum of numbers does."""
    return rows_by_torch(x.nan_to_num(0.0), grid)


def truncates(x, grid):
    """To the code next towards zero in place of the nearest."""
    codes, scale = rows_by_torch(x, grid)
    above = codes.float().abs() > (x.float() / scale).abs()
    return (codes.view(torch.uint8) - above.to(torch.uint8)).view(grid.dtype), scale


def flushes_subnormal_codes(x, grid):
    codes, scale = rows_by_torch(x, grid)
    small = codes.float().abs() < grid.min_normal
    return torch.where(small, torch.zeros_like(codes.float()), codes.float()).to(grid.dtype), scale


CPU = torch.device("cpu")


def test_right_kernels_are_found_right():
    assert fused.first_difference(kernels(), CPU) is None


@pytest.mark.parametrize("wrong", [through_bf16, one_code_off, loses_nan, truncates, flushes_subnormal_codes])
def test_wrong_casts_are_found_out(wrong):
    assert fused.first_difference(kernels(wrong), CPU) is not None


@pytest.mark.parametrize(
    "wrong", [lambda codes: codes.t().contiguous().flip(0), lambda codes: codes.view(codes.t().shape)]
)
def test_wrong_transposes_are_found_out(wrong):
    assert "transpose" in fused.first_difference(kernels(transpose_bytes=wrong), CPU)


def test_the_check_sees_every_bf16_number_of_both_grids_range():
    rows = fused._every_number()
    seen = set(rows.view(torch.int16).flatten().tolist())
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    assert set(every[every.abs() <= 448].view(torch.int16).tolist()) == seen
    for grid in (E4M3, E5M2):
        scale = rows_by_torch(rows, grid)[1]
        assert bool((scale == scale[0]).all())


def test_elsewhere_torch_does_it():
    x = torch.randn(4, 8).bfloat16()
    assert not fused.ready(x.device)
    assert fused.quantize_rows(x, E4M3) is None
    codes = torch.randint(0, 256, (5, 3), dtype=torch.uint8)
    transposed = fused.transpose_bytes(codes)
    assert transposed.is_contiguous()
    assert torch.equal(transposed, codes.t())


@pytest.fixture
def a_device(monkeypatch):
    """As much of a GPU as finding out about kernels needs."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    fused._checked.cache_clear()
    yield torch.device("cuda", 0)
    fused._checked.cache_clear()


@pytest.mark.parametrize("how", ["no triton", "another code"])
def test_a_device_where_kernels_fail_falls_back_and_says_so_once(a_device, how, monkeypatch, caplog):
    def missing():
        raise ModuleNotFoundError("No module named 'triton'")

    if how == "no triton":
        monkeypatch.setattr(fused, "_kernels", missing)
    else:
        monkeypatch.setattr(fused, "_kernels", lambda: kernels(one_code_off))
        monkeypatch.setattr(fused, "first_difference", lambda found, device: "1 of 2 codes differ")
    with caplog.at_level(logging.WARNING):
        assert [fused.ready(a_device) for _ in range(3)] == [False] * 3
    (record,) = caplog.records
    assert ("triton" if how == "no triton" else "1 of 2 codes differ") in record.getMessage()
    assert "same bits" in record.getMessage()


def test_a_device_without_fp8_products_is_not_asked(a_device, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert not fused.ready(a_device)
    assert not caplog.records
