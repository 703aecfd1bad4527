"""The ModelOpt layout: the artifact's bits, the documented keys, and no code rounded again by a reader."""

from __future__ import annotations

import json

import pytest
import torch
from language_edits import even
from safetensors.torch import load_file

from exporters.modelopt.checkpoint import export_checkpoint
from exporters.modelopt.target import ModeloptExportOptions
from fp8pipe.core.config import build_config
from fp8pipe.core.errors import GateFailedError


def export(source, output, text, **changes: object):
    chosen = {"format": "modelopt-checkpoint", "calibration_data": str(text)} | changes
    return export_checkpoint(source, output, build_config(ModeloptExportOptions, chosen))


def quantized(source) -> list[str]:
    stored = load_file(source / "model.safetensors")
    return [name for name, tensor in stored.items() if tensor.dtype == torch.float8_e4m3fn]


def test_equal_scales_are_written_as_fp8(language_artifact, language_text, tmp_path):
    source = language_artifact("llama", edit=even)
    written = export(source, tmp_path / "out", language_text)
    assert all(gate.passed for gate in written.manifest.gates)
    before, after = load_file(source / "model.safetensors"), load_file(written.root / "model.safetensors")
    names = quantized(source)
    assert len(names) == 14
    for name in names:
        layer = name.removesuffix(".weight")
        assert after[name].dtype == torch.float8_e4m3fn
        assert torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8))
        for scale in ("weight_scale", "input_scale"):
            assert (after[f"{layer}.{scale}"].dtype, after[f"{layer}.{scale}"].shape) == (torch.float32, ())
        assert after[f"{layer}.weight_scale"] == before[f"{layer}.weight_scale"]
    # What is joined has one input scale: a reader takes the largest of them.
    for block in range(2):
        attention = f"model.layers.{block}.self_attn"
        assert len({float(after[f"{attention}.{x}_proj.input_scale"]) for x in "qkv"}) == 1
    assert set(after) == set(before) | {n.replace(".weight", ".input_scale") for n in names}
    recorded = written.manifest.details.activation_scales
    assert recorded["model.layers.0.mlp.down_proj"].scale == float(after["model.layers.0.mlp.down_proj.input_scale"])


def test_the_configuration_has_the_documented_keys(language_artifact, language_text, tmp_path):
    source = language_artifact("llama", edit=even)
    written = export(source, tmp_path / "out", language_text)
    described = json.loads((written.root / "hf_quant_config.json").read_text())
    assert described["quantization"] == {
        "quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"],
    }  # fmt: skip
    config = json.loads((written.root / "config.json").read_text())
    block = config.pop("quantization_config")
    assert (block["quant_method"], block["quant_algo"], block["ignore"]) == ("modelopt", "FP8", ["lm_head"])
    form = {"dynamic": False, "num_bits": 8, "type": "float"}
    assert block["config_groups"] == {"group_0": {"input_activations": form, "weights": form, "targets": ["Linear"]}}
    assert config == json.loads((source / "config.json").read_text())


@pytest.mark.parametrize("options", [{"granularity": "per-channel"}, {"edit": None}])
def test_other_scales_go_one_a_row_and_no_code_changes(language_artifact, language_text, tmp_path, options):
    """One scale per row, or one per tensor that differs between layers that readers join."""
    source = language_artifact("llama", **options)
    written = export(source, tmp_path / "out", language_text)
    before, after = load_file(source / "model.safetensors"), load_file(written.root / "model.safetensors")
    described = json.loads((written.root / "hf_quant_config.json").read_text())
    assert described["quantization"]["quant_algo"] == "FP8_PER_CHANNEL_PER_TOKEN"
    assert not [name for name in after if name.endswith("input_scale")]
    for name in quantized(source):
        assert torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8))
        rows, scale = after[name].shape[0], after[f"{name}_scale"]
        assert scale.shape == (rows,)
        assert torch.equal(scale, before[f"{name}_scale"].reshape(-1).expand(rows))
    warned = [warning for warning in written.manifest.warnings if "unequal scales" in warning]
    assert bool(warned) == (options == {"edit": None})


def test_a_damaged_file_is_not_committed(language_artifact, language_text, tmp_path, monkeypatch):
    from exporters.modelopt import checkpoint

    real = checkpoint.save_file

    def damaged(tensors, path, metadata):
        changed = dict(tensors)
        name = next(n for n, t in changed.items() if t.dtype == torch.float8_e4m3fn)
        codes = changed[name].clone()
        codes.view(torch.uint8)[0, 0] ^= 1
        real(changed | {name: codes}, path, metadata=metadata)

    monkeypatch.setattr(checkpoint, "save_file", damaged)
    with pytest.raises(GateFailedError, match="weight codes differing"):
        export(language_artifact("llama", edit=even), tmp_path / "out", language_text)
    assert not (tmp_path / "out").exists()
