"""The activations of a step, counted on fake tensors, against what autograd saves in a real training step."""

from __future__ import annotations

import pytest
import torch

from fp8pipe.core.config import build_config
from fp8pipe.models.compat import import_transformers
from pipeline.dry_run.activations import layer_count, saved_bytes, with_layers
from pipeline.dry_run.memory import activation_bytes
from pipeline.dry_run.workload import Group, Workload
from pipeline.falqon.convert import read_convertible
from pipeline.finetune.attention import use_matmul_attention
from pipeline.finetune.config import FinetuneConfig
from pipeline.finetune.loss import answer_loss
from pipeline.finetune.processes import build_method

BATCH, LENGTH, RANK = 4, 64, 8
SIZES = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
# Per layer and token they save from 4 kB (GPT-NeoX, whose branches are parallel) to 11 kB (Gemma 2, with soft caps).
FAMILIES = {
    "Llama": SIZES,
    "Gemma2": SIZES | {"head_dim": 32},
    "GPT2": {"vocab_size": 256, "n_embd": 128, "n_layer": 3, "n_head": 4, "n_positions": 256, "eos_token_id": 1},
    "GPTNeoX": SIZES | {"intermediate_size": 512},
}


def settings_of(family):
    suffix = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    return getattr(import_transformers(), f"{family}Config")(**FAMILIES[family], architectures=[f"{family}{suffix}"])


def saved_in_a_step(model, method):
    """Bytes of activations that autograd saves in a real forward pass with a loss on one token a row."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    seen = {}

    def keep(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(0, 256, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = torch.full_like(ids, -100)
    labels[:, 8] = 1
    inputs = {"input_ids": ids, "position_ids": torch.arange(LENGTH).repeat(BATCH, 1)}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), method.forward_context():
        answer_loss(model.train(), inputs, labels)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in seen.items() if place not in own)


@pytest.mark.parametrize("method", ["live", "live-both", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_saves_what_was_counted(family, method):
    """Within 10 %: masks, the loss and B's copies are not counted, and layers that are stacked save a little less."""
    if method == "lora":
        pytest.importorskip("peft")
    settings = settings_of(family)
    model = import_transformers().AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16)
    use_matmul_attention(model)
    structure = read_convertible(model, RANK)
    groups = tuple(
        Group(tuple(structure.shape(name)[0] for name in each), structure.shape(each[0])[1])
        for each in structure.input_groups
    )
    given = {"method": method} if method == "lora" else {"update_rule": method, "initialisation": "random"}
    config = build_config(FinetuneConfig, {"model": "m", "data": "d", "rank": RANK, **given})
    trained = build_method(config)
    trained.prepare(model)
    found = saved_in_a_step(model, trained)

    saved = saved_bytes(settings, torch.bfloat16, BATCH, LENGTH)
    work = Workload(
        method=config.method, groups=groups, rank=RANK, gradients=False, compensated=False, flushes=False, layers=3,
        hidden=128, query=128, vocabulary=256, itemsize=2, stored=(0, 0), mapped=True, streamed=False, filed=True,
        shard=0, tokens=BATCH * LENGTH, length=LENGTH, answers=BATCH, saved=saved, checkpointing=False,
        trains_a=config.rule.trains_a,
    )  # fmt: skip
    assert activation_bytes(work) == pytest.approx(found, rel=0.1)


def test_a_model_that_does_not_run_on_fake_tensors_is_not_counted(monkeypatch):
    llama = type(import_transformers().AutoModelForCausalLM.from_config(settings_of("Llama")).model)
    monkeypatch.setattr(llama, "forward", lambda self, input_ids, **_: input_ids[0, 0].item() + None)
    assert saved_bytes(settings_of("Llama"), torch.bfloat16, 1, 16) is None


def test_fewer_layers_keep_their_own_settings():
    settings = settings_of("Gemma2")
    few = with_layers(settings, 1)
    assert layer_count(few) == len(few.layer_types) == 1
    assert layer_count(settings) == 3
