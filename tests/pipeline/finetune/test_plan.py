"""The plan and the early warnings: what a run needs, and what the export will refuse, before any training."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from exporters.tensorrt.language.source import open_language
from exporters.vllm.export import export_vllm
from exporters.vllm.options import VllmExportOptions
from fp8pipe.cli.tune import next_export
from fp8pipe.core import machine
from fp8pipe.core.config import build_config
from fp8pipe.core.errors import ConfigurationError, LintRefusedError
from fp8pipe.core.machine import Gpu
from fp8pipe.models.compat import import_transformers
from pipeline.dry_run.devices import DEVICES
from pipeline.finetune.config import FinetuneConfig
from pipeline.finetune.plan import plan_finetune
from pipeline.finetune.stage import finetune


def config(base, data, **changes):
    values = {"model": str(base), "data": str(data), "rank": 4, "steps": 1, "batch_size": 2, "sequence_length": 32}
    return build_config(FinetuneConfig, values | changes)


@pytest.fixture
def mixture(make_base):
    """A tiny model with experts, with the tokenizer of the other tiny models."""
    path = make_base()
    transformers = import_transformers()
    settings = transformers.MixtralConfig(
        vocab_size=272, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1, max_position_embeddings=512,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(settings).to(torch.bfloat16).save_pretrained(path)
    return path


def test_experts_are_planned_trained_and_exported_one_by_one(mixture, pairs, tmp_path):
    plan = plan_finetune(config(mixture, pairs))
    assert plan.facts["layers"] == 4 + 2 * 3  # attention, and two experts of three projections
    codes = (64 + 32 + 32 + 4) * 64 + (64 + 4) * 64 + 2 * ((64 + 4) * 64 + (64 + 4) * 32)  # rows of W and A, inputs
    # A of the inputs that layers share: qkv, o, and for each of two experts gate and up, and down.
    a = 4 * (64 + 64 + 2 * (64 + 32))
    assert plan.facts["converted_base_bytes"] == codes + 4 * a  # and directions in fp32
    both = plan_finetune(config(mixture, pairs, update_rule="live-both"))
    assert both.facts["converted_base_bytes"] == codes
    assert both.facts["trainable"] - plan.facts["trainable"] == a
    artifact = finetune(config(mixture, pairs), tmp_path / "out")
    export = export_vllm(artifact.root, tmp_path / "export", VllmExportOptions())
    stored = load_file(export.root / "model.safetensors")
    for leaf in ("w1", "w2", "w3"):
        name = f"model.layers.0.block_sparse_moe.experts.1.{leaf}.weight"
        assert stored[name].dtype is torch.float8_e4m3fn
        assert stored[f"{name}_scale"].shape == (stored[name].shape[0], 1)
    block = json.loads((export.root / "config.json").read_text())["quantization_config"]
    assert block["ignore"] == ["lm_head", "model.layers.0.block_sparse_moe.gate"]
    with pytest.raises(LintRefusedError, match="expert"):
        open_language(artifact.root)


def test_layers_may_choose_different_numbers_of_experts(make_base, pairs):
    """As Hunyuan-A13B's config.json says it: one number for each layer."""
    path = make_base()
    transformers = import_transformers()
    settings = transformers.HunYuanMoEV1Config(
        vocab_size=272, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, num_experts=4, moe_topk=[1, 2], max_position_embeddings=512,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(settings).to(torch.bfloat16).save_pretrained(path)
    assert plan_finetune(config(path, pairs)).facts["layers"] == 2 * (4 + 3 + 4 * 3)  # attention, shared, experts


def test_sides_that_no_fp8_kernel_takes_are_told_before_the_first_step(make_base, pairs, tmp_path, gpu_here):
    base = make_base(intermediate_size=88)
    (told,) = [note for note in plan_finetune(config(base, pairs)).notes if "dimension-multiple" in note]
    assert "--format bf16" in told
    artifact = finetune(config(base, pairs, steps=1, warmup_steps=0, device="cpu"), tmp_path / "out")
    assert any("dimension-multiple" in warning for warning in artifact.manifest.warnings)
    assert "--target vllm --format bf16" in next_export(artifact)
    with pytest.raises(LintRefusedError, match="multiples of 16"):
        export_vllm(artifact.root, tmp_path / "export", VllmExportOptions())


def test_a_plan_refuses_what_the_command_refuses(make_base, tmp_path):
    with pytest.raises(ConfigurationError, match="no data file") as refusal:
        plan_finetune(config(make_base(), tmp_path / "missing.jsonl"))
    assert refusal.value.fix


@pytest.fixture
def gpu_here(monkeypatch):
    """Puts a GPU into this machine."""

    def put(name: str = "a GPU of no table", capability: tuple[int, int] = (8, 9)) -> None:
        monkeypatch.setattr(machine, "gpus", lambda: [Gpu(name, capability, 24 << 30)])

    put()
    return put


def test_only_falqon_gains_from_fp8_hardware(make_base, pairs, gpu_here):
    base = make_base()
    plan = plan_finetune(config(base, pairs))
    assert "8.9" in plan.hardware
    assert plan.facts["device"] == "cuda (a GPU of no table, compute capability 8.9)"
    gpu_here("an Ampere card", (8, 6))  # too old for FP8, it runs all the same
    assert plan_finetune(config(base, pairs)).facts["device"].startswith("cuda")
    for method in ("lora", "qlora"):
        plan = plan_finetune(config(base, pairs, method=method))
        assert "8.9" not in plan.hardware
        assert plan.facts["device"].startswith("cuda")


def test_a_plan_has_estimates_for_all_gpus_of_the_table_where_there_is_none(make_base, pairs, gpu_here):
    plan = plan_finetune(config(make_base(), pairs, device="cuda"))
    assert set(plan.facts["estimated_step_seconds"]) == {device.name for device in DEVICES}
    for name, seconds in plan.facts["estimated_step_seconds_compiled"].items():
        assert 0 < seconds <= plan.facts["estimated_step_seconds"][name]
    assert plan.facts["estimated_memory_bytes"] > 0
    assert "no GPU has confirmed them" in plan.text()


def test_a_plan_has_estimates_for_the_gpu_that_is_here(make_base, pairs, gpu_here):
    def here(name):
        gpu_here(name)
        return plan_finetune(config(make_base(), pairs, device="cuda", method="qlora"))

    known, unknown = here("NVIDIA L40S"), here("NVIDIA GeForce RTX 4090 Laptop GPU")
    assert list(known.facts["estimated_step_seconds"]) == ["L40S"]
    assert "estimated_step_seconds_compiled" not in known.facts
    assert len(unknown.facts["estimated_step_seconds"]) == len(DEVICES)
    assert any("Laptop GPU is not in the table" in note for note in unknown.notes)


def test_what_was_not_counted_has_no_estimate(mixture, make_base, pairs, gpu_here):
    for unlike in (
        config(mixture, pairs, device="cuda"), config(make_base(seed=1), pairs, device="cuda", update_rule="released"),
    ):  # fmt: skip
        plan = plan_finetune(unlike)
        assert "estimated_step_seconds" not in plan.facts
        assert any(note.startswith("no GPU estimate") for note in plan.notes)
