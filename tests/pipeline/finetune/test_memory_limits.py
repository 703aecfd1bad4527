"""What preparing a model takes of a GPU's memory, at LLaMA-7B's shapes: little more than the model in bf16."""

from __future__ import annotations

import pytest
import torch
from fake_cuda import fake_cuda

from fp8pipe.models.compat import import_transformers
from pipeline.falqon.convert import convert_model
from pipeline.falqon.flush import preview
from pipeline.falqon.rules import Initialisation, update_rule

SHAPES = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32,
    "vocab_size": 32000,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize("rule", ["live-svd", "released"])
def test_conversion_and_preview_hold_little_beside_the_model(rule):
    transformers = import_transformers()
    transformers.LlamaForCausalLM  # noqa: B018
    with fake_cuda() as counter:
        with torch.device("cuda"):
            model = transformers.AutoModelForCausalLM.from_config(
                transformers.LlamaConfig(**SHAPES), dtype=torch.bfloat16
            )
        loaded = sum(parameter.nbytes for parameter in model.parameters())
        counter.clear()
        groups, _ = convert_model(
            model, update_rule(rule), rank=64, initialisation=Initialisation.RANDOMIZED_SVD, seed=0
        )
        assert counter.peak < 1.1 * loaded, counter.peak / loaded
        counter.clear()
        held = counter.peak
        assert held < 0.6 * loaded  # nothing of the old weights is left
        preview(max((group.layer for group in groups), key=lambda layer: layer.codes.numel()))
        assert counter.peak - held < 0.05 * loaded, (counter.peak - held) / loaded
