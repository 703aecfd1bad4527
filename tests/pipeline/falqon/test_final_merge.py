"""The final merge: compensated rounding beats nearest where it counts, and leaves alone what needs no change."""

from __future__ import annotations

import pytest
import torch

from fp8pipe.models.compat import import_transformers
from pipeline.falqon import final_merge
from pipeline.falqon.convert import convert_model
from pipeline.falqon.final_merge import merge_all, merge_group
from pipeline.falqon.rules import FinalMerge, Initialisation, update_rule


@pytest.fixture
def tuned(make_base):
    """A converted tiny model with a sizeable B, and inputs for it."""
    path = make_base("llama")
    model = import_transformers().AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    groups, _ = convert_model(model, update_rule("live"), rank=8, initialisation=Initialisation.RANDOMIZED_SVD, seed=0)
    torch.manual_seed(0)
    for group in groups:
        group.layer.lora_B.data.normal_(0, 0.02)
    batches = [{"input_ids": torch.randint(0, 272, (2, 32))} for _ in range(4)]
    return model, {g.name: g.layer for g in groups}, batches


def test_merging_leaves_the_function_nearly_alone_and_clears_b(tuned):
    model, layers, batches = tuned
    state = {name: (layer.codes.clone(), layer.lora_B.data.clone()) for name, layer in layers.items()}
    with torch.no_grad():
        before = model(**batches[0], use_cache=False).logits
    drift = {}
    for how in FinalMerge:
        for name, layer in layers.items():
            layer.codes.copy_(state[name][0])
            layer.lora_B.data.copy_(state[name][1])
        reports = merge_all(model, layers, how, lambda: batches, merge_group)
        assert not any(layer.lora_B.any() for layer in layers.values())
        assert {name: report.codes for name, report in reports.items()} == {
            name: layer.weight_codes.numel() for name, layer in layers.items()
        }
        changed = {
            name: int((layer.codes.float() != state[name][0].float())[: layer.out_features].sum())
            for name, layer in layers.items()
        }
        assert {name: report.changed for name, report in reports.items()} == changed
        with torch.no_grad():
            drift[how] = (model(**batches[0], use_cache=False).logits - before).float().norm()
    assert drift[FinalMerge.COMPENSATED] < drift[FinalMerge.NEAREST]


def test_a_small_memory_budget_gives_the_same_codes_up_to_the_order_of_merging(tuned, monkeypatch):
    model, layers, batches = tuned
    monkeypatch.setattr(final_merge, "_MOMENT_BYTES", 1)  # one layer at a time
    passes = []
    reports = merge_all(model, layers, FinalMerge.COMPENSATED, lambda: passes.append(1) or batches, merge_group)
    assert len(passes) == len(layers)
    assert [report.rows for report in reports.values()] == [layer.out_features for layer in layers.values()]
