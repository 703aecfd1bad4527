"""A tiny model from training to its export: every weight that is stored is the code that was trained."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from exporters.vllm.export import export_vllm
from exporters.vllm.options import VllmExportOptions
from exporters.vllm.reopen import iter_weights
from fp8pipe.core.config import build_config
from pipeline.finetune.config import FinetuneConfig
from pipeline.finetune.stage import finetune


@pytest.fixture
def trained(make_base, pairs, tmp_path):
    """A tuned artifact of a Llama that vLLM's CPU attention supports (head size 32)."""
    base = make_base(
        "llama", hidden_size=128, intermediate_size=192, num_attention_heads=4, num_key_value_heads=2, head_dim=32
    )
    values = {"model": str(base), "data": str(pairs), "rank": 16, "steps": 8, "batch_size": 2, "sequence_length": 64}
    return finetune(build_config(FinetuneConfig, values | {"learning_rate": 1e-2}), tmp_path / "model")


def test_every_exported_weight_is_the_trainers_code_times_its_scale(trained, tmp_path):
    export = export_vllm(trained.root, tmp_path / "export", VllmExportOptions())
    stored = load_file(trained.root / "model.safetensors")
    seen = set()
    for name, weight in iter_weights(export.root):
        layer = name.removesuffix(".weight")
        scale = stored.get(f"{layer}.weight_scale")
        expected = stored[name].float() if scale is None else stored[name].float() * scale
        assert torch.equal(weight, expected)
        seen.add(name)
    assert seen == {name for name in stored if not name.endswith(".weight_scale")}


def test_served_weights_are_exact_in_bf16(trained):
    """Power-of-two scales: an engine that computes in bf16 holds exactly code * scale."""
    stored = load_file(trained.root / "model.safetensors")
    scales = [name for name in stored if name.endswith(".weight_scale")]
    assert scales
    for name in scales:
        weight = stored[name.removesuffix("_scale")].float() * stored[name]
        assert torch.equal(weight.to(torch.bfloat16).float(), weight)
