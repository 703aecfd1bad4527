"""Weights of tokens against autograd's own hooks, with and without activation checkpointing; the moments they give."""

from __future__ import annotations

import pytest
import torch

from fp8pipe.models.compat import import_transformers
from pipeline.falqon.convert import convert_model
from pipeline.falqon.guided import guided_moments, token_weights
from pipeline.falqon.rules import Initialisation, update_rule

NAMES = ("model.layers.1.self_attn.k_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")


@pytest.fixture(params=[False, True], ids=["plain layers", "FALQON layers"])
def model(request, make_base):
    found = import_transformers().AutoModelForCausalLM.from_pretrained(
        make_base(num_hidden_layers=2), dtype=torch.float32
    )
    if request.param:
        convert_model(found, update_rule("live"), 4, Initialisation.RANDOM, 0)
    return found.requires_grad_(False)


def batches():
    ids = torch.randint(0, 16, (3, 2, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": each} for each in ids]


def losses_of(model):
    return lambda: (model(**batch, labels=batch["input_ids"], use_cache=False).loss for batch in batches())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_weights_are_the_squared_norms_of_gradients_in_the_order_of_calls(model, checkpointing):
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    found = token_weights(model, NAMES, losses_of(model))
    assert all(parameter.grad is None for parameter in model.parameters())
    model.gradient_checkpointing_disable()
    wanted = {name: [] for name in NAMES}
    model.get_input_embeddings().weight.requires_grad_()

    def keep(name):
        model.get_submodule(name).register_full_backward_hook(lambda _, __, out: wanted[name].append(out[0].double()))

    for name in NAMES:
        keep(name)
    for loss in losses_of(model)():
        loss.backward()
    for name, each in wanted.items():
        assert len(found[name]) == 3  # one call in each batch
        for weights, gradient in zip(found[name], each, strict=True):
            expected = gradient.square().sum(-1).flatten()
            assert torch.allclose(weights.double(), expected, rtol=1e-4, atol=0)  # fp32 sums of at most 192 squares


def test_moments_count_each_token_by_its_weight(model):
    name = NAMES[2]
    weights = token_weights(model, NAMES, losses_of(model))
    found = guided_moments(model, weights, batches)[name]
    inputs = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, args, __: inputs.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in batches():
            model(**batch, use_cache=False)
    handle.remove()
    wanted, plain = torch.zeros_like(found, dtype=torch.float64), torch.zeros_like(found, dtype=torch.float64)
    for x, each in zip(inputs, weights[name], strict=True):
        for row, weight in zip(x.double(), each.double(), strict=True):
            wanted += weight * torch.outer(row, row)
            plain += torch.outer(row, row)
    assert torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))  # fp32 sums
    assert not torch.allclose(wanted / wanted.trace(), plain / plain.trace(), rtol=0.1)
    for each in weights[name]:  # nothing follows the last token of a row, and in the last layer no other depends on it
        rows = each.view(2, 12)
        assert bool((rows[:, -1] == 0).all())
        assert bool((rows[:, :-1] > 0).all())
