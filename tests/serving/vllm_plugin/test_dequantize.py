"""The plugin's arithmetic, without vLLM: exactness, fused parts, and refusals."""

from __future__ import annotations

import pytest
import torch
from fp8pipe_vllm_cpu import TESTED_VERSIONS, Settings, UntestedVersionError, check_version
from fp8pipe_vllm_cpu.dequantize import (
    UNSET_SCALE,
    Activations,
    Granularity,
    dequantize,
    resolve_shard_scales,
    round_trip,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor


def all_codes(rows: int, columns: int) -> Tensor:
    """Every finite E4M3 code in turn, both zeros included."""
    finite = [code for code in range(256) if code & 0x7F != 0x7F]
    table = torch.tensor(finite, dtype=torch.uint8)
    return (
        table.repeat(rows * columns // len(table) + 1)[: rows * columns]
        .reshape(rows, columns)
        .view(torch.float8_e4m3fn)
    )


def decode(byte: int) -> float:
    """An E4M3 code from the specification: sign, 4 exponent bits (bias 7), 3 mantissa bits, no infinity."""
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = (byte >> 3) & 0xF, byte & 0x7
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def by_hand(codes: Tensor, scale_of: list[list[float]]) -> Tensor:
    """Products in fp64, rounded to fp32 once: a code and an fp32 scale have few enough bits."""
    values = torch.tensor([[decode(int(b)) for b in row] for row in codes.view(torch.uint8)], dtype=torch.float64)
    return (values * torch.tensor(scale_of, dtype=torch.float64)).float()


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))


def test_each_fused_part_keeps_its_own_scale() -> None:
    codes, scales, widths = all_codes(10, 30), torch.tensor([0.003, 7.5, 1e-6]), [5, 2, 3]
    rows = [scales[0].item()] * 5 + [scales[1].item()] * 2 + [scales[2].item()] * 3
    assert same_bits(dequantize(codes, scales, widths), by_hand(codes, [[s] * 30 for s in rows]))


def test_a_scale_a_row() -> None:
    codes, scale = all_codes(9, 30), torch.rand(9, 1) + 1e-4
    assert same_bits(dequantize(codes, scale, [4, 5]), by_hand(codes, [[s.item()] * 30 for s in scale]))


@pytest.mark.parametrize("shape", [(8, 12), (7, 11)])  # whole blocks, and cut ones at both edges
def test_blocks(shape: tuple[int, int]) -> None:
    rows, columns = shape
    codes, scale = all_codes(rows, columns), torch.rand(2, 3) + 1e-4
    spread = [[scale[r // 4, c // 4].item() for c in range(columns)] for r in range(rows)]
    assert same_bits(dequantize(codes, scale, [rows], block=(4, 4)), by_hand(codes, spread))


def test_large_layers_are_done_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scale = all_codes(13, 20), torch.rand(13, 1) + 1e-3
    whole = dequantize(codes, scale, [13])
    monkeypatch.setattr("fp8pipe_vllm_cpu.dequantize._CHUNK_ELEMENTS", 45)  # two rows at a time, one left over
    assert same_bits(dequantize(codes, scale, [13]), whole)


def test_rounding_to_bf16_happens_once() -> None:
    codes, scale = all_codes(4, 64), torch.full((4, 1), 0.0123)
    result = dequantize(codes, scale, [4], dtype=torch.bfloat16)
    assert torch.equal(result, by_hand(codes, [[scale[0].item()] * 64] * 4).bfloat16())


def test_a_layer_fused_on_disk_has_one_scale_for_all_parts() -> None:
    loaded = torch.tensor([0.5, UNSET_SCALE, UNSET_SCALE])
    assert resolve_shard_scales(loaded).tolist() == [0.5, 0.5, 0.5]
    assert loaded[1] == UNSET_SCALE


@pytest.mark.parametrize(
    "scale",
    [
        torch.tensor([UNSET_SCALE, UNSET_SCALE]),  # nothing loaded
        torch.tensor([UNSET_SCALE, 0.5]),  # the first part lacks one
        torch.full((4, 1), UNSET_SCALE),
        torch.tensor([0.5, 0.0]),
        torch.tensor([0.5, float("nan")]),
        torch.tensor([0.5, -0.5]),
        torch.tensor([0.5, 0.5, 0.5]),  # more scales than parts
        torch.full((3, 1), 0.5),
    ],
)
def test_unusable_scales_are_refused(scale: Tensor) -> None:
    with pytest.raises(ValueError, match="scale"):
        dequantize(all_codes(4, 8), scale, [2, 2])


def test_three_parts_of_which_one_lacks_a_scale() -> None:
    with pytest.raises(ValueError, match=r"part\(s\) \[2\] of 3"):
        resolve_shard_scales(torch.tensor([0.5, 0.25, UNSET_SCALE]))


def test_codes_of_another_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        dequantize(torch.zeros(2, 2, dtype=torch.float8_e5m2), torch.ones(1), [2])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_token_round_trip_is_within_half_a_step(tokens: int, seed: int, size: float) -> None:
    x = torch.randn(tokens, 32, generator=torch.Generator().manual_seed(seed)) * size
    back = round_trip(x, Activations(Granularity.TOKEN))
    # Half a step of E4M3 is 2**-4 of a normal value; below that, half the subnormal step of the row's scale.
    floor = x.abs().amax(-1, keepdim=True) / 448.0 * 2.0**-10
    assert bool(((back - x).abs() <= torch.maximum(x.abs() * 2.0**-4, floor) * 1.0001).all())


def test_granularities_share_scales_as_they_say() -> None:
    x = torch.tensor([[448.0, 1.0, 0.001, 0.0015], [4.48, 3.3, 100.0, 1.0]])
    token = round_trip(x, Activations(Granularity.TOKEN))
    tensor = round_trip(x, Activations(Granularity.TENSOR))
    group = round_trip(x, Activations(Granularity.GROUP, 2))
    assert torch.equal(token[0], tensor[0])  # the first row holds the tensor's largest value
    assert token[0, 2] != group[0, 2]  # a group of small values has a scale of its own
    assert torch.equal(group[0, 2:], round_trip(x[:1, 2:], Activations(Granularity.TOKEN))[0])
    static = round_trip(x, Activations(Granularity.STATIC), torch.tensor(0.1))
    assert static[0, 0] == pytest.approx(44.8)  # saturates at 448 codes
    assert round_trip(x, Activations(Granularity.NONE)) is x


def test_rows_of_zeros_stay_zero_and_bad_schemes_are_refused() -> None:
    assert not round_trip(torch.zeros(2, 4), Activations(Granularity.TOKEN)).any()
    with pytest.raises(ValueError, match="input_scale"):
        round_trip(torch.ones(1, 4), Activations(Granularity.STATIC))
    with pytest.raises(ValueError, match="groups of 3"):
        round_trip(torch.ones(1, 4), Activations(Granularity.GROUP, 3))


def test_tested_versions_pass() -> None:
    assert check_version(TESTED_VERSIONS[0]) is None
    assert check_version(f"{TESTED_VERSIONS[0]}+cpu") is None


@pytest.mark.parametrize("version", ["0.33.0", "0.32.1", "0.3", "dev", "0.32.0rc1"])
def test_other_versions_are_refused_by_name(version: str) -> None:
    with pytest.raises(UntestedVersionError) as caught:
        check_version(version)
    for part in (version, *TESTED_VERSIONS, "FP8PIPE_VLLM_ANY_VERSION=1", "pip install"):
        assert part in str(caught.value)


def test_an_untested_version_can_be_allowed_and_says_so() -> None:
    warning = check_version("0.99.0", allow_any=True)
    assert warning is not None
    assert "0.99.0" in warning


def test_settings_come_from_the_environment() -> None:
    assert Settings.from_environment({}) == Settings()
    chosen = {"FP8PIPE_VLLM_ACTIVATIONS": "quant", "FP8PIPE_VLLM_KEEP_WEIGHTS": "1", "FP8PIPE_VLLM_ANY_VERSION": "1"}
    assert Settings.from_environment(chosen) == Settings(True, True, True)
    with pytest.raises(ValueError, match="FP8PIPE_VLLM_ACTIVATIONS is 'yes'"):
        Settings.from_environment({"FP8PIPE_VLLM_ACTIVATIONS": "yes"})
