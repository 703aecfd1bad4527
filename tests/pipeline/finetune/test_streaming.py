"""Weights that wait on the host: results and conversion are those of a model that is on the device as a whole."""

from __future__ import annotations

import pytest
import torch
from fake_cuda import fake_cuda
from tuning_config import config

from fp8pipe.core import machine
from fp8pipe.models.compat import import_transformers
from fp8pipe.models.language.sources import resolve_model
from fp8pipe.numerics.grids import same_bits
from pipeline.falqon.convert import convert_model
from pipeline.falqon.rules import Initialisation, update_rule
from pipeline.finetune import loading
from pipeline.finetune.loss import answer_loss
from pipeline.finetune.streaming import stop_streaming, stream_weights


def linears(model):
    return [name for name, module in model.named_modules() if hasattr(module, "weight") and "_proj" in name]


def convert(model):
    def losses():
        for seed in range(2):
            ids = torch.randint(5, 272, (2, 24), generator=torch.Generator().manual_seed(seed))
            yield answer_loss(model, {"input_ids": ids}, ids, 50.0)

    groups, _ = convert_model(model, update_rule("live"), 8, Initialisation.GRADIENT, 0, losses=losses)
    return [group.layer for group in groups]


def test_gradients_codes_and_the_converted_model_are_the_same(make_base):
    """The CPU stands for the GPU as well; what is copied is then the same tensor, in a parameter of its own."""
    path = make_base("llama")
    plain, streamed = (
        import_transformers().AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16) for _ in range(2)
    )
    names = linears(streamed)
    weights = {name: streamed.get_submodule(name).weight for name in names}
    stream_weights(streamed, names, torch.device("cpu"))
    ids = torch.arange(24).view(2, 12) + 5
    assert same_bits(streamed(ids).logits, plain(ids).logits)
    with pytest.raises(RuntimeError):
        streamed.get_submodule(names[0])(torch.zeros(1, 7))  # also a call that fails gives the weight back
    assert all(streamed.get_submodule(name).weight is weight for name, weight in weights.items())
    other = import_transformers().AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    stream_weights(other, names, torch.device("cpu"))
    stop_streaming(other)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in other.modules())
    assert same_bits(other(ids).logits, plain(ids).logits)
    for one, two in zip(convert(plain), convert(streamed), strict=True):
        assert same_bits(one.codes, two.codes)
    assert same_bits(streamed(ids).logits, plain(ids).logits)
    assert not any(module._forward_pre_hooks for module in streamed.modules())


def test_only_called_layers_have_their_weight_on_the_gpu():
    with fake_cuda():
        shapes = import_transformers().LlamaConfig(
            hidden_size=64, intermediate_size=128, num_attention_heads=4, vocab_size=96, num_hidden_layers=2
        )
        model = import_transformers().AutoModelForCausalLM.from_config(shapes, dtype=torch.bfloat16)
        names = linears(model)
        stream_weights(model, names, torch.device("cuda"))
        seen = []
        for name in names:
            model.get_submodule(name).register_forward_hook(
                lambda module, args, output: seen.append((args[0].is_cuda, output.is_cuda))
            )
        model(torch.zeros(1, 8, dtype=torch.int64, device="cuda"))
        assert seen == [(True, True)] * len(names)
        places = {name: parameter.is_cuda for name, parameter in model.named_parameters()}
        assert {name.removesuffix(".weight") for name, on_gpu in places.items() if not on_gpu} == set(names)


@pytest.mark.parametrize(
    ("share", "method", "shared", "waits"),
    [(0.6, "falqon", False, True), (0.4, "falqon", False, False), (0.6, "lora", False, False),
     (0.6, "lora", True, True), (0.4, "lora", True, False)],
)  # fmt: skip
def test_a_model_of_more_than_half_the_gpus_memory_waits_on_the_host(
    make_base, pairs, monkeypatch, share, method, shared, waits
):
    base = make_base("llama")
    source, settings = (
        resolve_model(str(base)),
        config(base, pairs, method=method).model_copy(update={"device": "cuda"}),
    )
    kind = import_transformers().LlamaForCausalLM
    size = sum(p.nbytes for p in kind.from_pretrained(base, dtype=torch.bfloat16).parameters())
    monkeypatch.setattr(machine, "gpus", lambda: [machine.Gpu("one", (9, 0), int(size / share))])
    found = loading._streamed(settings, kind, loading.load_config(source.path), shared)
    assert len(found) == (14 if waits else 0)


def test_the_weights_digest_sees_other_values_of_the_same_shapes(make_base):
    base = make_base("llama")
    before = loading.weights_digest(base)
    assert loading.weights_digest(base) == before
    file = base / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert loading.weights_digest(base) != before
