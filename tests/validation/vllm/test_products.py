"""What products tell of a kernel: right ones stay within what they may lose, and each fault is seen where it lies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fp8_layers import PackedKernel, ScaledKernel, make_codes, make_layer

from validation.vllm.kernel_report import kernel_report
from validation.vllm.kernels import find_kernel, through_gemm
from validation.vllm.products import APPROXIMATE, examine, make_tokens, nearest_e4m3

ROWS, COLUMNS = 48, 200  # the last tile of columns is not full


def examined(dtype: torch.dtype = torch.bfloat16, **faults: Any) -> dict[str, Any]:
    kernel = ScaledKernel()
    for name, value in faults.items():
        setattr(kernel, name, value)
    codes, scale = make_codes(ROWS, COLUMNS)
    layer = make_layer(codes, scale, kernel, dtype)
    found = find_kernel(layer, ROWS, COLUMNS)
    assert (found.name, found.holds, found.device) == ("ScaledKernel", "codes", "cpu")
    assert torch.equal(found.codes[0].view(torch.uint8), codes.view(torch.uint8))  # out of the kernel's layout
    return examine(layer, found, codes.float() * scale)


def test_rounding_is_that_of_torch() -> None:
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    values = values[values.isfinite()]
    expected = values.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(nearest_e4m3(values).to(torch.float8_e4m3fn).view(torch.uint8), expected.view(torch.uint8))


def test_tokens_meet_every_weight_once_and_ten_binades_of_codes() -> None:
    tiles, edges = make_tokens(COLUMNS, torch.bfloat16)
    assert torch.equal((tiles != 0).sum(0), torch.ones(COLUMNS, dtype=torch.int64))
    scale = tiles.float().abs().amax(1, keepdim=True) / 448
    assert len({int(e) for e in torch.frexp(nearest_e4m3(tiles.float() / scale)).exponent.unique()}) >= 10
    assert edges.shape == (4, COLUMNS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("faults", [{}, {"reciprocal": True}, {"bits": 13}], ids=["exact", "reciprocal", "tensor core"])
def test_a_right_kernel_is_within_its_bound(dtype: torch.dtype, faults: dict[str, Any]) -> None:
    found = examined(dtype, **faults)
    assert found["error_rounded"] < 1 < 2 < found["error_plain"]  # one of both alone: rounding is told from none
    assert found["codes"] == (7 + 4) * COLUMNS
    assert found["codes_differing"] == 0
    assert (
        found["rounding"] == "divided by amax / 448"
    )  # the way of the reciprocal gives the same codes on these tokens


def test_inputs_that_are_not_rounded_are_told() -> None:
    found = examined(rounds=False)
    assert found["error_plain"] < 1 < 2 < found["error_rounded"]
    assert found["codes"] == 0  # none was seen: the kernel goes another way


def test_no_input_lies_where_right_kernels_may_round_to_either_side() -> None:
    """Within 2^-20 of a tie; drawn at random, 5 of 1,024 do."""
    tiles, _ = make_tokens(1024, torch.bfloat16)
    quotients = tiles.float() / (tiles.float().abs().amax(1, keepdim=True) / 448)
    sides = [(quotients * (1 + sign * 2.0**-20)).clamp(-448, 448).to(torch.float8_e4m3fn) for sign in (-1, 1)]
    assert torch.equal(sides[0].view(torch.uint8), sides[1].view(torch.uint8))


def test_a_product_that_is_off_is_told() -> None:
    found = examined(off=1.05)
    assert min(found["error_plain"], found["error_rounded"]) > 1
    assert examined(off=float("nan"))["error_rounded"] != examined(off=float("nan"))["error_rounded"]  # NaN stays


def test_a_division_in_which_the_last_bit_is_off_is_told_from_a_right_one_and_taken() -> None:
    found = examined(approximate=1 + 2.0**-23)
    assert (found["codes_differing"], found["rounding"]) == (0, APPROXIMATE)
    assert found["error_rounded"] < 1
    assert examined(approximate=1 + 2.0**-18)["codes_differing"] > 1000  # every code of tokens with another scale


def test_codes_that_are_cut_instead_of_rounded_are_counted() -> None:
    assert examined(truncates=True)["codes_differing"] > 100


def test_packed_codes_are_read_through_products() -> None:
    codes, scale = make_codes(ROWS, COLUMNS)
    layer = make_layer(codes, scale, PackedKernel())
    kernel = find_kernel(layer, ROWS, COLUMNS)
    assert (kernel.name, kernel.holds, kernel.codes) == ("PackedKernel", "packed", ())
    weight = through_gemm(layer, torch.arange(COLUMNS), ROWS, COLUMNS)
    assert torch.equal(weight, (codes.float() * scale.bfloat16().float()).bfloat16().float())
    found = examine(layer, kernel, weight)
    assert found["error_plain"] < 1 < found["error_rounded"]


def told(**other: Any) -> dict[str, Any]:
    right = {"kernel": "K", "device": "cuda:0", "holds": "codes", "tensors": ["a.weight", "b.weight"]}
    found = {"error_rounded": 0.2, "error_plain": 7.0, "codes": 40, "codes_differing": 0, "rounding": "divided"}
    return right | found | other


@pytest.mark.parametrize(
    ("other", "gate", "words"),
    [
        ({"holds": "numbers"}, "hold another thing", "l (K) holds numbers, not FP8 codes"),
        ({"error_rounded": 7.0, "error_plain": 0.2}, "round inputs otherwise", "inputs of l (K) are not rounded"),
        ({"error_rounded": 3.0}, "error of products", "l (K)"),
        ({"error_rounded": float("nan"), "error_plain": float("nan")}, "error of products", "l (K)"),
        ({"codes_differing": 2}, "codes of activations", "l (K), closest to divided"),
        ({"tensors": ["a.weight"]}, "in no examined layer", "b.weight"),
    ],
    ids=["numbers", "unrounded", "off", "nan", "codes", "another tensor"],
)
def test_each_fault_fails_a_gate_that_names_the_layer(other: dict[str, Any], gate: str, words: str) -> None:
    names = ["a.weight", "b.weight"]
    right = kernel_report({"l": told()}, names, names, codes=True)
    assert all(gate.passed for gate in right.gates)
    assert (right.rounding, right.worst_product, right.devices) == (1, 0.2, {"cuda:0": 1})
    wrong = kernel_report({"k": told(), "l": told(**other), "m": told()} if "tensors" not in other else
                          {"l": told(**other)}, names, names, codes=True)  # fmt: skip
    (failed,) = [found for found in wrong.gates if not found.passed]
    assert gate in failed.name
    assert words in failed.detail


def test_a_form_that_does_not_round_wants_inputs_as_they_are() -> None:
    plain = told(error_rounded=7.0, error_plain=0.2, holds="packed")
    names = ["a.weight", "b.weight"]
    assert all(gate.passed for gate in kernel_report({"l": plain}, names, [], codes=True).gates)
    (failed,) = [g for g in kernel_report({"l": told()}, names, [], codes=True).gates if not g.passed]
    assert "inputs of l (K) are rounded" in failed.detail
