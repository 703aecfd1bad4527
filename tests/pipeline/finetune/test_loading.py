"""Loading for a GPU: each tensor goes there from its file, none waits in the host's memory for the others."""

from __future__ import annotations

import logging

import torch

from fp8pipe.models.compat import import_transformers
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
