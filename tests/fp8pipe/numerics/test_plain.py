"""The second opinion: plain arithmetic against ml_dtypes, and against the quantizers whose word it must not take."""

from __future__ import annotations

import inspect

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fp8pipe.numerics import plain
from fp8pipe.numerics.grids import dequantize_weight, quantize_weight, same_bits, to_bf16
from fp8pipe.numerics.plain import dequantize_plain, grid_numbers, quantize_plain, round_bf16, row_errors

NUMBERS = st.floats(-(2.0**40), 2.0**40, width=32, allow_subnormal=False)
MATRICES = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=NUMBERS)


def test_it_shares_no_line_with_the_quantizers() -> None:
    source = inspect.getsource(plain)
    assert "fp8pipe" not in source.replace("fp8pipe:", "")
    assert "float8" not in source


def test_all_codes_are_decoded_by_definition() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, -1)
    expected = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(dequantize_plain(codes, torch.ones(1)).numpy()[0], expected, equal_nan=True)


@settings(max_examples=200, deadline=None)
@given(values=hnp.arrays(np.float32, 40, elements=st.floats(-448, 448, width=32)))
def test_numbers_are_rounded_as_ml_dtypes_rounds_them(values: np.ndarray) -> None:
    ours = grid_numbers(torch.from_numpy(values)).numpy()
    theirs = values.astype(np.float64).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def test_ties_and_ends_of_the_grid() -> None:
    values = torch.tensor([1.0625, 1.1875, 2.0**-10, 3 * 2.0**-10, 500.0, -1e9, -0.0, 464.0])
    assert grid_numbers(values).tolist() == [1.0, 1.25, 0.0, 2.0**-8, 448.0, -448.0, -0.0, 448.0]


@settings(max_examples=200, deadline=None)
@given(values=MATRICES, transposed=st.booleans())
def test_weights_come_out_as_the_exporter_writes_them(values: np.ndarray, transposed: bool) -> None:
    weight = torch.from_numpy(values)
    codes, scale = quantize_weight(weight, transposed=transposed)
    written = dequantize_weight(codes, scale, transposed=transposed)
    assert same_bits(quantize_plain(weight, transposed=transposed), written)
    assert same_bits(dequantize_plain(codes, scale, transposed=transposed), written)


@settings(max_examples=200, deadline=None)
@given(values=MATRICES)
def test_bf16_is_that_of_torch(values: np.ndarray) -> None:
    weight = torch.from_numpy(values)
    assert same_bits(round_bf16(weight), to_bf16(weight).float())


def test_ties_go_to_the_even_bf16() -> None:
    ties = (torch.arange(0x3F80, 0x4080, dtype=torch.int32) << 16 | 0x8000).view(torch.float32)
    assert same_bits(round_bf16(ties), ties.to(torch.bfloat16).float())


def test_errors_of_rows() -> None:
    original = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
    assert row_errors(original, original) == 0.0
    assert row_errors(original + torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]), original) == pytest.approx(0.2)
    assert row_errors(original.T + 0.0, original.T, transposed=True) == 0.0
    assert row_errors(original + torch.tensor([[0.0], [1e-9], [0.0]]), original) == float("inf")
    assert np.isnan(row_errors(original * float("nan"), original))
    assert row_errors(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0])) == pytest.approx(1.0)
    assert row_errors(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)  # one row of two
