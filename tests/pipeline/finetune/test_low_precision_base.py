"""A base in FP8 trains and exports as the plain checkpoint of the same values does, bit for bit, and is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_checkpoints import read_back, write_compressed_tensors, write_native
from safetensors.torch import load_file, save_file
from tiny_checkpoints import make_model, write_tokenizer
from tuning_config import config

from exporters.target import foresee
from exporters.vllm.dry_run import plan_vllm
from exporters.vllm.export import export_vllm
from exporters.vllm.options import ExportFormat, VllmExportOptions
from fp8pipe.artifact import open_artifact
from fp8pipe.artifact.kinds import LORA_KIND
from fp8pipe.models.checkpoint.quantized.base import copy_base_files, read_base
from fp8pipe.models.checkpoint.tensors import weight_entries, write_index
from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.sources import resolve_model
from pipeline.finetune.loading import load_model
from pipeline.finetune.stage import finetune


def write_base(root: Path, form: str) -> Path:
    if form == "fp8":
        return write_native(root, make_model())
    write_compressed_tensors(root, make_model(), "channel")
    write_tokenizer(root)
    return root


def in_shards(root: Path) -> None:
    """The scales of each second weight in a file of their own, as a writer that fills files in order may leave them."""
    tensors = load_file(root / "model.safetensors")
    (root / "model.safetensors").unlink()
    files = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    last = [name for name in tensors if name.endswith("_scale_inv")]
    parts = [{n: t for n, t in tensors.items() if (n in last) is held} for held in (False, True)]
    for file, part in zip(files, parts, strict=True):
        save_file(part, root / file, metadata={"format": "pt"})
    write_index(root, {n: f for f, part in zip(files, parts, strict=True) for n in part}, 1)


def plain_twin(base: Path, root: Path) -> Path:
    """The same values in floating point, as any tool would have saved them."""
    root.mkdir()
    copy_base_files(base, root)
    tensors = {name: entry.read() for name, entry in read_base(base).entries.items()}
    save_file(tensors, root / "model.safetensors", metadata={"format": "pt"})
    return root


def tensors_of(root: Path) -> dict[str, torch.Tensor]:
    return {name: entry.read().reshape(-1).view(torch.uint8) for name, entry in weight_entries(root).items()}


def assert_equal(one: Path, other: Path) -> None:
    a, b = tensors_of(one), tensors_of(other)
    assert a.keys() == b.keys()
    assert not [name for name in a if not torch.equal(a[name], b[name])]
    settings = [json.loads((root / "config.json").read_text(encoding="utf-8")) for root in (one, other)]
    assert settings[0] == settings[1]
    assert {p.name for p in one.iterdir()} == {p.name for p in other.iterdir()}


@pytest.mark.parametrize("form", ["fp8", "compressed-tensors"])
def test_it_is_tuned_and_exported_as_the_values_it_stands_for(tmp_path: Path, pairs: Path, form: str) -> None:
    base = write_base(tmp_path / "base", form)
    if form == "fp8":
        in_shards(base)
    plain = plain_twin(base, tmp_path / "plain")
    stored = read_base(base).stored
    tuned = finetune(config(base, pairs, steps=2), tmp_path / "tuned")
    twin = finetune(config(plain, pairs, steps=2), tmp_path / "twin")
    if form == "fp8":  # the index of its one file is all that the twin lacks
        (tuned.root / "model.safetensors.index.json").unlink()
        (tuned.root / "model-00001-of-00002.safetensors").rename(tuned.root / "model.safetensors")
    assert_equal(tuned.root, twin.root)
    assert tuned.manifest.parents[0].stored == stored
    assert twin.manifest.parents[0].stored is None
    assert f"the base model was already quantized, as {stored}" in tuned.manifest.warnings[0]
    for format in (ExportFormat.FP8, ExportFormat.BF16):
        options = VllmExportOptions(format=format)
        ours, theirs = (export_vllm(src, tmp_path / f"{src.name}-{format}", options) for src in (base, plain))
        for name in ("manifest.json", "manifest.sha256", "README.md"):  # they name the parent
            for export in (ours, theirs):
                (export.root / name).unlink()
        assert_equal(ours.root, theirs.root)
        assert ours.manifest.parents[0].stored == stored
    document, plan = plan_vllm(base, tmp_path / "dry", options)
    assert any("was already quantized" in warning for warning in document["warnings"])
    assert plan.output_bytes == plan_vllm(plain, tmp_path / "dry", options)[1].output_bytes


def test_experts_are_decoded_before_transformers_stacks_them(tmp_path: Path) -> None:
    """In the layout of DeepSeek-V3 experts lie apart in the checkpoint, each with its scales; so they are trained."""
    transformers = import_transformers()
    settings = transformers.DeepseekV3Config(
        vocab_size=260, hidden_size=128, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=128, kv_lora_rank=64,
        qk_rope_head_dim=64, qk_nope_head_dim=64, v_head_dim=64,
    )  # fmt: skip
    torch.manual_seed(0)
    base = write_native(tmp_path / "base", transformers.AutoModelForCausalLM.from_config(settings).eval())
    stored = read_base(base).stored
    assert stored is not None
    assert stored.weights == 26
    ours = load_model(config(base, "unused", device="cpu"), resolve_model(str(base))).state_dict()
    theirs = read_back(base, transformers.FineGrainedFP8Config, every=True)
    stacked = "model.layers.1.mlp.experts"
    for number, (joined, down) in enumerate(
        zip(theirs.pop(f"{stacked}.gate_up_proj"), theirs.pop(f"{stacked}.down_proj"), strict=True)
    ):
        parts = dict(zip(("gate_proj", "up_proj"), joined.chunk(2), strict=True)) | {"down_proj": down}
        theirs |= {f"{stacked}.{number}.{name}.weight": part for name, part in parts.items()}
    assert theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_the_record_is_read_back_typed(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "compressed-tensors")
    export = export_vllm(base, tmp_path / "export", VllmExportOptions())
    written: dict[str, Any] = json.loads((export.root / "manifest.json").read_text(encoding="utf-8"))["parents"][0]
    assert written["stored"] == {
        "method": "compressed-tensors", "codes": "e4m3", "granularity": ["per-channel"], "weights": 14, "dtype": "BF16"
    }  # fmt: skip
    assert open_artifact(export.root).manifest.parents == export.manifest.parents
    assert not any(foresee(export.root, LORA_KIND).values())  # an export, too, is a base
    # What declares the format decides what the model is: its digest covers it.
    (base / "hf_quant_config.json").write_text('{"quantization": {}}')
    assert export_vllm(base, tmp_path / "again", VllmExportOptions()).manifest.parents[0].digest != written["digest"]
