"""Loading: for a GPU each tensor goes there from its file; on a CPU weights stay in their files if they can."""

from __future__ import annotations

import logging

import torch
from tuning_config import config

from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.base import check_base
from fp8pipe.models.language.sources import resolve_model
from pipeline.finetune import loading


def test_tensors_go_from_their_files_to_the_gpu(make_base, monkeypatch, caplog):
    """What transformers is asked for; without a GPU a CPU stands in where it is done."""
    assert loading.placement("cpu") == {}
    asked = loading.placement("cuda")
    assert asked == {"device_map": {"": torch.device("cuda")}}
    model = import_transformers().LlamaForCausalLM.from_pretrained(make_base("llama"), device_map={"": "cpu"})
    assert model.to("cpu") is model
    with caplog.at_level(logging.WARNING, logger=loading.__name__):
        monkeypatch.setattr(loading, "find_spec", lambda name: None)
        assert loading.placement("cuda") == {}
    assert "pip install accelerate" in caplog.text


def test_the_least_memory_of_a_run_leaves_out_what_stays_mapped(make_base):
    base = make_base("llama")
    source, structure = resolve_model(str(base)), check_base(base, "a model")
    model = import_transformers().LlamaForCausalLM.from_pretrained(base)
    every = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for name, p in model.named_parameters() if "_proj" in name)
    least = {
        (method, dtype): loading.least_memory(config(base, "data", method=method, dtype=dtype), source, structure)
        for method in ("falqon", "lora") for dtype in ("bfloat16", "float32")
    }  # fmt: skip
    assert least == {
        ("falqon", "bfloat16"): trained,  # codes
        ("lora", "bfloat16"): 2 * trained,  # weights after their merge
        ("falqon", "float32"): 4 * every,  # loading converts them
        ("lora", "float32"): 4 * every,
    }
