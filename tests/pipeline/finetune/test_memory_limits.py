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
    "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 4,
    "vocab_size": 32000,
}  # fmt: skip
WHOLE = 13.5e9  # bytes of all 32 layers in bf16
LIMIT = 0.06  # of them


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_conversion_and_preview_hold_little_beside_the_model():
    transformers = import_transformers()
    transformers.LlamaForCausalLM  # noqa: B018
    with fake_cuda() as counter:
        with torch.device("cuda"):
            model = transformers.AutoModelForCausalLM.from_config(
                transformers.LlamaConfig(**SHAPES), dtype=torch.bfloat16
            )
        loaded = sum(parameter.nbytes for parameter in model.parameters())
        counter.clear()
        how = {"rank": 64, "initialisation": Initialisation.RANDOMIZED_SVD, "seed": 0}
        groups, _ = convert_model(model, update_rule("live"), **how)
        # The first layers are converted beside the whole model; each gives back more than the next one takes.
        assert counter.peak - loaded < LIMIT * WHOLE, (counter.peak - loaded) / WHOLE
        counter.clear()
        held = counter.peak
        assert held < 0.65 * loaded  # codes, embedding and head: nothing of the old weights is left
        preview(max((group.layer for group in groups), key=lambda layer: layer.codes.numel()))
        assert counter.peak - held < LIMIT * WHOLE, (counter.peak - held) / WHOLE
