"""What an engine should hold of one tensor, in each form: codes rounded by ml_dtypes, and hashes of numpy arrays."""

from __future__ import annotations

import hashlib

import ml_dtypes
import numpy as np
import pytest
import torch

from fp8pipe.numerics.grids import same_bits
from validation.vllm.held import Expected, Holding

BF16, CODES = Holding(torch.bfloat16), Holding(torch.bfloat16, codes=True)
ROWS, COLUMNS, BLOCK = 6, 10, (4, 3)


def some_codes(rows: int = ROWS, columns: int = COLUMNS) -> np.ndarray:
    """E4M3 numbers, both zeros among them, fp32."""
    drawn = np.random.default_rng(0).normal(scale=100, size=(rows, columns)).astype(np.float32)
    drawn[0, :2] = 0.0, -0.0
    return drawn.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def some_scales(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(0.001, 0.1, shape).astype(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    return values.astype(ml_dtypes.bfloat16).astype(np.float32)


def sha(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def per_element(scale: np.ndarray) -> np.ndarray:
    """A scale per block for every element."""
    return np.kron(scale, np.ones(BLOCK, np.float32))[:ROWS, :COLUMNS]


SCALES = {
    "tensor": (some_scales(), None, False),
    "row": (some_scales(ROWS, 1), None, False),
    "block": (some_scales(2, 4), BLOCK, False),
    "transposed": (some_scales(1, COLUMNS), None, True),
}


@pytest.mark.parametrize("name", SCALES)
def test_codes_scales_and_products_of_a_quantized_weight(name: str) -> None:
    scale, block, transposed = SCALES[name]
    codes, factor = some_codes(), per_element(scale) if block else scale
    weight = Expected(
        "w", torch.from_numpy(codes * factor), torch.from_numpy(np.asarray(scale)), transposed, block=block
    )
    held, scales = weight.held(CODES)
    outputs = COLUMNS if transposed else ROWS
    assert (held.name, held.transposed, held.block, scales.name) == ("w", transposed, None, "w_scale")
    assert same_bits(held.value, torch.from_numpy(codes))
    wanted = scale if block else np.broadcast_to(scale.reshape(-1, 1), (outputs, 1))
    assert same_bits(scales.value, torch.from_numpy(np.array(wanted)))
    assert (scales.scale, scales.transposed) == (None, False)
    # By the scale in fp32, or by the scale in bf16; adding zero makes every zero positive.
    products = [sha(to_bf16(codes * one) + 0.0) for one in (factor, to_bf16(np.asarray(factor)))]
    assert list(held.products) == products
    assert held.digests()["products"] == products
    assert same_bits(held.numbers(held.value), held.value)  # they are codes already


def test_equal_products_are_told_once() -> None:
    codes = torch.from_numpy(some_codes())
    (product,) = Expected("w", codes / 4, torch.tensor([0.25]), False).held(CODES)[0].products
    assert product == sha(to_bf16(codes.numpy() / 4) + 0.0)


def test_scales_that_are_stored_as_a_row_are_held_as_a_row() -> None:
    """Those of experts that are stored as (in, out)."""
    scale = torch.from_numpy(some_scales(1, COLUMNS))
    value = torch.from_numpy(some_codes()) * scale
    assert same_bits(Expected("w", value, scale, True, scale_shape=(1, COLUMNS)).held(CODES)[1].value, scale)


@pytest.mark.parametrize("scale", [None, torch.tensor([0.01])], ids=["plain", "quantized"])
def test_without_codes_a_weight_is_rounded_once(scale: torch.Tensor | None) -> None:
    value = torch.from_numpy(some_codes() * np.float32(0.01))
    weight = Expected("w", value, scale, False)
    (held,) = weight.held(BF16)
    assert same_bits(held.value, torch.from_numpy(to_bf16(value.numpy())))
    assert not same_bits(held.value, value)
    (again,) = held.held(BF16)
    assert again.value is held.value  # nothing to round: a copy may have gigabytes


def test_one_element_that_is_no_number_of_the_dtype_is_rounded() -> None:
    value = torch.ones(3, 700_001)  # more than are looked at together
    value[-1, -1] = 0.1
    (held,) = Expected("w", value, None, False).held(BF16)
    assert same_bits(held.value, value.bfloat16().float())


def test_what_is_not_quantized_has_no_codes() -> None:
    (held,) = Expected("w", torch.full((2, 2), 0.1), None, False).held(CODES)
    assert same_bits(held.value, torch.full((2, 2), 0.1).bfloat16().float())
    assert held.products == ()


@pytest.mark.parametrize("holding", [BF16, CODES], ids=["bf16", "codes"])
def test_scales_of_the_cache_stay_in_fp32(holding: Holding) -> None:
    scale = Expected("k_scale", torch.tensor([0.1]), None, False, wide=True)
    assert scale.held(holding) == [scale]


def test_digests_tell_zeros_apart_once_and_once_do_not() -> None:
    values = some_codes(3, 700_001)  # more than are hashed at a time, in no whole number of pieces
    values[-1, -1] = -0.0
    found = Expected("w", torch.from_numpy(values), None, True).digests()
    positive = np.where(values == 0, np.float32(0), values)
    assert found == {
        "shape": [3, 700_001], "transposed": True, "quantized": False, "sha256": sha(values),
        "sha256_unsigned_zero": sha(positive),
    }  # fmt: skip
    assert sha(values) != sha(positive)
    assert Expected("w", torch.ones(1), torch.ones(1), False).digests()["quantized"]
    strided = torch.from_numpy(some_codes()).t()
    assert Expected("w", strided, None, False).digests()["sha256"] == sha(strided.numpy())
