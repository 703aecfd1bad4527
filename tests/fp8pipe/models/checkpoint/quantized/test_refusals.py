"""What is not known to be read back exactly is refused, with what was found, before anything is read of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.checkpoint.quantized.base import read_base

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}


def ct(weights: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": WEIGHTS | (weights or {})}
    whole = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}
    return whole | changes


def codes(rows: int = 256, columns: int = 192) -> Tensor:
    return torch.zeros(rows, columns).to(torch.float8_e4m3fn)


def held(suffix: str = "_scale_inv", *shape: int, **more: Tensor) -> dict[str, Tensor]:
    return {"a.weight": codes(), "a.weight" + suffix: torch.ones(shape or (2, 2)), "n.weight": torch.ones(4), **more}


CHANNEL = held("_scale", 256, 1)
# What config.json says, what is stored, and words of the message.
CASES: dict[str, tuple[Any, dict[str, Tensor], str]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, held(), "method gptq"),
    "awq": ({"quant_method": "awq", "bits": 4}, held(), "method awq"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, held(), "method bitsandbytes"),
    "a name alone": ("int8", held(), "'int8'|method int8"),
    "e5m2": (FP8 | {"fmt": "e5m2"}, held(), "its codes are e5m2"),
    "a block that is none": (FP8 | {"weight_block_size": [128]}, held(), r"weight_block_size is \[128\]"),
    "a block of nothing": (FP8 | {"weight_block_size": [0, 128]}, held(), r"\[0, 128\]"),
    "another block": (
        FP8 | {"weight_block_size": [64, 64]},
        held(),
        r"\(2, 2\).*\(256, 192\).*\(4, 3\) per block of 64x64",
    ),
    "transposed": (FP8 | {"weight_block_size": [256, 96]}, held("_scale_inv", 2, 1), r"\(2, 1\).*expected \(1, 2\)"),
    "no scale": (
        FP8,
        {"a.weight": codes(), "b.weight": codes()},
        "2 of 2 FP8 weights have no scale: a.weight",
    ),
    "a scale alone": (FP8, held(**{"b.weight_scale_inv": torch.ones(1)}), r"1 scale\(s\) belong to no weight.*b\."),
    "scales of integers": (FP8, held() | {"a.weight_scale_inv": torch.ones(2, 2).int()}, "a.weight_scale_inv is I32"),
    "nothing in FP8": (FP8, {"a.weight": torch.ones(2, 2)}, "no tensor is in FP8"),
    "another grid beside": (FP8, held(**{"b.weight": codes().to(torch.float8_e5m2)}), "b.weight has dtype F8_E5M2"),
    "integers beside": (FP8, held(**{"b.qweight": torch.ones(2, 2).int()}), "b.qweight has dtype I32"),
    "packed": (ct(format="pack-quantized"), CHANNEL, "format pack-quantized"),
    "fake-quantized": (ct(quantization_status="frozen"), CHANNEL, "quantization_status is frozen"),
    "rotated": (ct(transform_config={"config_groups": {"u": {}}}), CHANNEL, "transform_config"),
    "sparse": (ct(sparsity_config={"format": "sparse-24-bitmask"}), CHANNEL, "sparse-24-bitmask"),
    "four bits": (ct({"num_bits": 4}), CHANNEL, "4-bit float"),
    "integers": (ct({"type": "int"}), CHANNEL, "8-bit int"),
    "asymmetric": (ct({"symmetric": False}), CHANNEL, "not symmetric"),
    "groups": (ct({"strategy": "group", "group_size": 32}), CHANNEL, "symmetric, group"),
    "a preset": (ct(config_groups={"FP8": ["Linear"]}), CHANNEL, "not spelt out"),
    "a preset of a group": (ct(config_groups={"g": {"weights": "fp8"}}), CHANNEL, "weights of g are 'fp8', not an obj"),
    "a known name alone": ("fp8", held(), "quantization_config in config.json is 'fp8', not an object"),
    "no weights": (ct(config_groups={}), CHANNEL, "0 weight formats"),
    "zero points": (ct(), CHANNEL | {"a.weight_zero_point": torch.ones(256, 1)}, "a.weight_zero_point is not zero"),
    "rows": (ct(), held("_scale", 192, 1), r"\(192, 1\).*expected \(256, 1\) per row"),
    "W4A8 of ModelOpt": ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, held(), "quant_algo is W4A8_AWQ"),
    "nothing declared": (None, held(), "a.weight has dtype F8_E4M3, config.json declares no format"),
    "an integer norm": (None, {"n.weight": torch.ones(8).char()}, "n.weight has dtype I8, config.json declares no"),
}


def write(root: Path, block: Any, tensors: dict[str, Tensor], **more: Any) -> Path:
    root.mkdir(exist_ok=True)
    save_file(tensors, root / "model.safetensors")
    (root / "config.json").write_text(json.dumps({"quantization_config": block, "dtype": "bfloat16", **more}))
    return root


@pytest.mark.parametrize("name", list(CASES))
def test_a_format_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    block, tensors, words = CASES[name]
    with pytest.raises(ConfigurationError, match="quantized already") as caught:
        read_base(write(tmp_path, block, tensors))
    assert caught.value.exit_code == 10
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(caught.value.why)


def test_the_cases_differ_from_what_is_read_in_one_thing(tmp_path: Path) -> None:
    assert read_base(write(tmp_path, FP8, held())).stored is not None
    for wide in (torch.float64, torch.float32):
        assert read_base(write(tmp_path, None, {"n.weight": torch.ones(8, dtype=wide)})).stored is None
    for dtype in (torch.float32, torch.int8, torch.float8_e4m3fn):
        zero = {"a.weight_zero_point": torch.zeros(256, 1).to(dtype)}
        assert read_base(write(tmp_path, ct(), CHANNEL | zero)).entries.keys() == {"a.weight", "n.weight"}
    early = {key: value for key, value in ct().items() if key != "quant_method"}
    assert read_base(write(tmp_path, None, CHANNEL, compression_config=early)).stored is not None


def test_two_declarations_must_agree(tmp_path: Path) -> None:
    write(tmp_path, FP8, held(), text_config={"quantization_config": ct()})
    with pytest.raises(ConfigurationError, match="quantized already") as caught:
        read_base(tmp_path)
    assert "2 formats that differ" in caught.value.why
    write(tmp_path, FP8, held())
    (tmp_path / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    with pytest.raises(ConfigurationError) as caught:
        read_base(tmp_path)
    assert "hf_quant_config.json says ModelOpt's FP8" in caught.value.why


def test_rows_of_a_transposed_layer_are_not_defined(tmp_path: Path) -> None:
    square = {"a.weight": codes(64, 64), "a.weight_scale": torch.ones(64, 1)}
    with pytest.raises(ConfigurationError) as caught:
        read_base(write(tmp_path, ct(), square, model_type="gpt2"))
    assert "(in, out)" in caught.value.why
    assert read_base(write(tmp_path, ct(), square, model_type="llama")).stored is not None


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_a_scale_that_is_not_positive_is_refused_by_name_when_it_is_used(tmp_path: Path, scale: float) -> None:
    wrong = torch.ones(2, 2)
    wrong[1, 0] = scale
    base = write(tmp_path, FP8, held() | {"a.weight_scale_inv": wrong})
    entry = read_base(base).entries["a.weight"]
    for read in (entry.read, lambda: entry.read_rows(range(130, 140))):
        with pytest.raises(ConfigurationError) as refused:
            read()
        assert "1 of 4 scales of a.weight_scale_inv are zero or negative" in refused.value.why
