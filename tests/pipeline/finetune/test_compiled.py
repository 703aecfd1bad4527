"""A decoder layer at a time through torch.compile: one graph without a break for all layers, and no bit changed."""

from __future__ import annotations

import logging

import pytest
import torch
from fake_cuda import fake_cuda
from functorch.compile import nop
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch import config as functorch_config

from fp8pipe.models.compat import import_transformers
from fp8pipe.numerics import backends
from pipeline.falqon.convert import convert_model
from pipeline.falqon.rules import Initialisation, update_rule
from pipeline.finetune.compiled import compile_layers, decoder_layers, fall_back, wrap_layer

SHAPES = {
    "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "vocab_size": 64,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _forget_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_model():
    transformers = import_transformers()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SHAPES), dtype=torch.bfloat16)
    convert_model(model, update_rule("live"), rank=8, initialisation=Initialisation.RANDOM, seed=0)
    for layer in model.modules():
        if hasattr(layer, "lora_B"):
            layer.lora_B.data.normal_(std=0.02)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def compile_with(model, backend, fullgraph=True):
    for layer in decoder_layers(model):
        wrap_layer(layer, torch.compile(layer.forward, backend=backend, fullgraph=fullgraph))


def step(model, device="cpu"):
    ids = (torch.arange(48, device=device) % 64).view(2, 24)
    loss = model(input_ids=ids, use_cache=False).logits.float().square().mean()
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_one_graph_serves_all_layers_and_changes_no_bit(monkeypatch):
    """On a CPU, with the torch casts: the compiled ones are opaque to the tracer."""
    monkeypatch.setattr(backends, "library", lambda: None)
    plain, compiled = make_model(), make_model()
    counter = CompileCounterWithBackend("aot_eager")
    compile_with(compiled, counter)
    (loss, gradients), (same_loss, same) = step(plain), step(compiled)
    assert torch.equal(loss, same_loss)
    assert len(gradients) == 2 * 4
    assert gradients.keys() == same.keys()
    assert all(torch.equal(gradients[name], same[name]) for name in gradients)
    step(compiled)
    assert counter.frame_count == 1


@pytest.mark.parametrize("broken", ["forward", "backward"])
def test_a_pass_that_does_not_compile_runs_as_it_is_with_the_same_bits_and_is_said(broken, monkeypatch, caplog):
    monkeypatch.setattr(backends, "library", lambda: None)

    def fails(graph, inputs):
        raise RuntimeError(f"no {broken} for this layer")

    passes = {"fw_compiler": nop, "bw_compiler": nop, f"{broken[0]}w_compiler": fails}
    plain, compiled = make_model(), make_model()
    with (
        torch._dynamo.config.patch(suppress_errors=False),
        functorch_config.patch(force_non_lazy_backward_lowering=False),
        caplog.at_level(logging.WARNING),
    ):
        fall_back()
        compile_with(compiled, aot_autograd(**passes), fullgraph=False)
        (loss, gradients), (same_loss, same) = step(plain), step(compiled)
    assert torch.equal(loss, same_loss)
    assert all(torch.equal(gradients[name], same[name]) for name in gradients)
    assert f"no {broken} for this layer" in caplog.text


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_one_graph_without_a_break_on_cuda():
    import_transformers().LlamaForCausalLM  # noqa: B018
    counter = CompileCounterWithBackend("eager")
    with fake_cuda(counted=False):
        with torch.device("cuda"):
            model = make_model()
        compile_with(model, counter)
        _, gradients = step(model, "cuda")
        assert len(gradients) == 2 * 4
        assert all(gradient.is_cuda for gradient in gradients.values())
    assert counter.frame_count == 1


def test_what_cannot_be_compiled_runs_as_it_is_and_the_log_says_why(caplog):
    import_transformers().LlamaForCausalLM  # noqa: B018
    model = make_model()
    assert not compile_layers(model, exact_casts=True)  # on a CPU
    assert not caplog.records
    with fake_cuda((8, 0), counted=False), torch.device("cuda"), caplog.at_level(logging.WARNING):
        model = make_model()
        assert not compile_layers(model, exact_casts=False)
        assert not caplog.records
        assert not compile_layers(model, exact_casts=True)
    assert [record.getMessage() for record in caplog.records] == [
        "decoder layers run uncompiled, which takes longer: this GPU has no FP8 tensor cores"
    ]
