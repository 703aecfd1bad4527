"""Checkpoints in NVFP4 as base models: against compressed-tensors and, for ModelOpt, ml_dtypes; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import save_file
from tiny_checkpoints import make_model, write_plain
from torch import Tensor

from exporters.vllm.export import export_vllm
from exporters.vllm.options import ExportFormat, VllmExportOptions
from exporters.vllm.reopen import iter_weights
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.checkpoint.quantized.base import copy_base_files, read_base
from fp8pipe.numerics.grids import same_bits

FP4, FP8 = ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn
WEIGHTS = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}
CT: dict[str, Any] = {
    "quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
}  # fmt: skip
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
SUFFIXES = {"compressed-tensors": ("_packed", "_scale", "_global_scale"), "modelopt": ("", "_scale", "_scale_2")}


def stored(method: str, **more: Tensor) -> dict[str, Tensor]:
    """Every code and many scales, among them zero, in a layer `a`; global scales are no powers of two."""
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (24, 32), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 0x7F, (24, 4), dtype=torch.uint8, generator=generator)
    scales[5, 2] = 0
    whole = torch.tensor([371.25]) if method == "compressed-tensors" else torch.tensor(0.0027)
    parts = (packed, scales.view(torch.float8_e4m3fn), whole)
    found = {f"a.weight{suffix}": part for suffix, part in zip(SUFFIXES[method], parts, strict=True)}
    return found | {"n.weight": torch.ones(4).bfloat16()} | more


def write(root: Path, block: Any, tensors: dict[str, Tensor], *, beside: bool = False) -> Path:
    root.mkdir()
    save_file(tensors, root / "model.safetensors")
    config = {"dtype": "bfloat16"} if beside else {"dtype": "bfloat16", "quantization_config": block}
    (root / "config.json").write_text(json.dumps(config))
    if beside:
        (root / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    return root


def test_compressed_tensors_reads_the_same_numbers(tmp_path: Path) -> None:
    tensors = stored("compressed-tensors", **{"a.input_global_scale": torch.tensor([3.0])})
    base = read_base(write(tmp_path / "base", CT, tensors))
    scheme = QuantizationConfig.model_validate(CT).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    parts = {name.removeprefix("a."): value for name, value in tensors.items() if name.startswith("a.weight")}
    expected = compressor.decompress(parts, scheme)["weight"]
    assert same_bits(base.entries["a.weight"].read(), expected.bfloat16())
    assert same_bits(base.entries["a.weight"].read_rows(range(7, 19)), expected[7:19].bfloat16())
    assert base.entries.keys() == {"a.weight", "n.weight"}
    assert base.runtime == ("a.input_global_scale",)
    assert str(base.stored) == "FP4 (compressed-tensors, per-block of 1x16), 1 weight(s) dequantized to BF16"


@pytest.mark.parametrize("beside", [False, True])
def test_the_layout_of_modelopt_against_ml_dtypes(tmp_path: Path, beside: bool) -> None:
    """Declared in config.json, or in hf_quant_config.json alone."""
    tensors = stored("modelopt", **{"a.input_scale": torch.tensor(0.1)})
    root = write(tmp_path / "base", MODELOPT, tensors, beside=beside)
    pairs, scales = tensors["a.weight"].numpy(), tensors["a.weight_scale"].view(torch.uint8).numpy().view(FP8)
    codes = np.stack([pairs & 15, pairs >> 4], -1).reshape(24, -1).view(FP4).astype(np.float32)
    factor = scales.astype(np.float32) * tensors["a.weight_scale_2"].numpy()
    base = read_base(root)
    assert same_bits(base.entries["a.weight"].read(), torch.from_numpy(codes * factor.repeat(16, 1)).bfloat16())
    assert base.runtime == ("a.input_scale",)
    (tmp_path / "copy").mkdir()
    copy_base_files(root, tmp_path / "copy")
    assert not (tmp_path / "copy" / "hf_quant_config.json").exists()


def test_an_export_in_nvfp4_is_a_base(tmp_path: Path) -> None:
    """Its values, which bf16 holds exactly, are those of the base."""
    plain = write_plain(tmp_path / "plain", make_model())
    export = export_vllm(plain, tmp_path / "x", VllmExportOptions(format=ExportFormat.NVFP4)).root
    base = read_base(export)
    for name, value in iter_weights(export):
        assert same_bits(base.entries[name].read().float(), value), name
    assert any("already quantized, as FP4" in warning for warning in base.warnings())


def without(name: str, method: str = "compressed-tensors") -> dict[str, Tensor]:
    return {key: value for key, value in stored(method).items() if key != name}


def weights(**changes: Any) -> dict[str, Any]:
    return CT | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS | changes}}}


PACKED = stored("compressed-tensors")
CASES = {
    "no divisor": (CT, without("a.weight_global_scale"), "a.weight_packed has no a.weight_global_scale"),
    "no scales": (MODELOPT, without("a.weight_scale", "modelopt"), "a.weight has no a.weight_scale"),
    "no codes": (CT, without("a.weight_packed"), "no tensor holds such codes"),
    "the other layout": (MODELOPT, PACKED, "no tensor holds such codes"),
    "groups of 32": (weights(group_size=32), PACKED, "group_size 32"),
    "integers": (weights(type="int"), PACKED, "type int"),
    "no group": (CT | {"config_groups": {}}, PACKED, "no weight format"),
    "scales of rows": (CT, PACKED | {"a.weight_scale": torch.ones(24, 1)}, r"\(24, 1\); expected"),
    "two divisors": (CT, PACKED | {"a.weight_global_scale": torch.ones(2)}, "expected one number"),
    "a scale alone": (CT, PACKED | {"b.weight_scale": torch.ones(2)}, "the first: b.weight_scale"),
    "FP8 beside": (CT, PACKED | {"b.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}, "b.weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_read_is_refused(name: str, tmp_path: Path) -> None:
    block, tensors, said = CASES[name]
    with pytest.raises(ConfigurationError, match=said):
        read_base(write(tmp_path / "base", block, tensors))


@pytest.mark.parametrize("wrong", ["zero", "negative", "block"])
def test_scales_that_are_not_positive_are_refused_when_they_are_read(wrong: str, tmp_path: Path) -> None:
    tensors = stored("compressed-tensors")
    if wrong == "block":
        tensors["a.weight_scale"].view(torch.uint8)[2, 1] = 0x90
    else:
        tensors["a.weight_global_scale"][0] = 0.0 if wrong == "zero" else -1.0
    entry = read_base(write(tmp_path / "base", CT, tensors)).entries["a.weight"]
    with pytest.raises(ConfigurationError, match="scales are positive"):
        entry.read()
