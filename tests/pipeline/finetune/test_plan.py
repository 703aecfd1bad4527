"""The plan and the early warnings: what a run needs, and what the export will refuse, before any training."""

from __future__ import annotations

import pytest
import torch

from exporters.vllm.export import export_vllm
from exporters.vllm.options import VllmExportOptions
from fp8pipe.cli.tune import next_export
from fp8pipe.core.config import build_config
from fp8pipe.core.errors import ConfigurationError, LintRefusedError, MissingCapabilityError
from fp8pipe.core.machine import Gpu
from fp8pipe.models.compat import import_transformers
from pipeline.dry_run.devices import DEVICES
from pipeline.finetune import plan as plan_module
from pipeline.finetune.config import FinetuneConfig
from pipeline.finetune.method import check_device, hardware
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


def test_experts_are_told_at_plan_and_at_start_and_refused_by_the_export(mixture, pairs, tmp_path):
    plan = plan_finetune(config(mixture, pairs))
    warning = plan.notes[0]
    assert "experts" in warning
    assert "--format bf16" in warning
    assert warning in plan.text()
    artifact = finetune(config(mixture, pairs), tmp_path / "out")
    assert warning in artifact.manifest.warnings
    with pytest.raises(LintRefusedError, match="unknown-matrix"):
        export_vllm(artifact.root, tmp_path / "export", VllmExportOptions())


def test_sides_that_no_fp8_kernel_takes_are_told_before_the_first_step(make_base, pairs, tmp_path):
    base = make_base(intermediate_size=88)
    (told,) = [note for note in plan_finetune(config(base, pairs, device="cuda")).notes if "dimension-multiple" in note]
    assert "--format bf16" in told
    artifact = finetune(config(base, pairs, steps=1, warmup_steps=0), tmp_path / "out")
    assert any("dimension-multiple" in warning for warning in artifact.manifest.warnings)
    assert "--target vllm --format bf16" in next_export(artifact)
    with pytest.raises(LintRefusedError, match="multiples of 16"):
        export_vllm(artifact.root, tmp_path / "export", VllmExportOptions())


def test_a_plan_refuses_what_the_command_refuses(make_base, tmp_path):
    with pytest.raises(ConfigurationError, match="no data file") as refusal:
        plan_finetune(config(make_base(), tmp_path / "missing.jsonl"))
    assert refusal.value.fix


def test_only_falqon_asks_for_fp8_hardware(make_base, pairs):
    base = make_base()
    assert "8.9" in plan_finetune(config(base, pairs, device="cuda")).hardware
    for method in ("lora", "qlora"):
        assert "8.9" not in plan_finetune(config(base, pairs, device="cuda", method=method)).hardware
    assert hardware("falqon", "cpu") == "a CPU"


def test_a_gpu_too_old_for_fp8_still_runs_the_baselines(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "an Ampere card")
    check_device("cuda", "lora")
    with pytest.raises(MissingCapabilityError, match="Ampere"):
        check_device("cuda", "falqon")


def test_a_plan_reckons_all_gpus_of_the_table_where_there_is_none(make_base, pairs):
    plan = plan_finetune(config(make_base(), pairs, device="cuda"))
    assert set(plan.facts["reckoned_seconds"]) == {device.name for device in DEVICES}
    for name, seconds in plan.facts["reckoned_compiled"].items():
        assert 0 < seconds <= plan.facts["reckoned_seconds"][name]
    assert plan.facts["reckoned_memory"] > 0
    assert "no GPU has confirmed them" in plan.text()


def test_a_plan_reckons_the_gpu_that_is_here(make_base, pairs, monkeypatch):
    def here(name):
        monkeypatch.setattr(plan_module, "gpus", lambda: [Gpu(name, (8, 9), 24 << 30)])
        return plan_finetune(config(make_base(), pairs, device="cuda", method="qlora"))

    known, unknown = here("NVIDIA L40S"), here("NVIDIA GeForce RTX 4090 Laptop GPU")
    assert list(known.facts["reckoned_seconds"]) == ["L40S"]
    assert "reckoned_compiled" not in known.facts
    assert len(unknown.facts["reckoned_seconds"]) == len(DEVICES)
    assert any("Laptop GPU is not in the table" in note for note in unknown.notes)


def test_what_was_not_counted_is_not_reckoned(mixture, make_base, pairs):
    for unlike in (
        config(mixture, pairs, device="cuda"), config(make_base(seed=1), pairs, device="cuda", update_rule="released"),
    ):  # fmt: skip
        plan = plan_finetune(unlike)
        assert "reckoned_seconds" not in plan.facts
        assert any(note.startswith("no GPU is reckoned") for note in plan.notes)
