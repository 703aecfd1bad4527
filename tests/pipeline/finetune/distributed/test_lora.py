"""QLoRA's packed weights before they are sharded: no device holds all of them."""

from __future__ import annotations

import pytest
import torch
from mixtures import mixture

from pipeline.finetune import method
from pipeline.finetune.distributed.lora import ShardedLora
from pipeline.finetune.method import LoraMethod


def test_each_packed_weight_leaves_the_device_that_quantized_it_before_the_next_is_quantized(monkeypatch):
    """The device `meta` takes the place of the CPU, which takes that of a GPU."""
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    seen: list[list[str]] = []
    packed: list[torch.nn.Module] = []
    pack = method._to_nf4

    def noted(model, name, *options):
        pack(model, name, *options)
        packed.append(model.get_submodule(name))
        seen.append([layer.weight.device.type for layer in packed])

    monkeypatch.setattr(method, "_to_nf4", noted)
    monkeypatch.setattr(LoraMethod, "waits", torch.device("meta"))
    LoraMethod(rank=4, alpha=4.0, seed=0, quantized=True).prepare(mixture("llama"))
    assert len(seen) > 1
    assert all(set(devices) == {"meta"} for devices in seen)
    assert {layer.quant_state.absmax.device.type for layer in packed} == {"cpu"}  # where they are computed with


def test_they_wait_on_the_cpu():
    assert ShardedLora.waits == torch.device("cpu")
