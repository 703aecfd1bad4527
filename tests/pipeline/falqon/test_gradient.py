"""The gradient initialisation: its directions against the true gradient's SVD, and the model left as it was."""

from __future__ import annotations

import pytest
import torch
from fake_cuda import fake_cuda

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.compat import import_transformers
from pipeline.falqon import observed, sums
from pipeline.falqon.convert import convert_model
from pipeline.falqon.initialise import gradient_sketches
from pipeline.falqon.rules import Initialisation, update_rule
from pipeline.finetune.loss import answer_loss

GROUPS = [["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"], ["model.layers.1.self_attn.o_proj"]]


@pytest.fixture
def model(make_base):
    return import_transformers().AutoModelForCausalLM.from_pretrained(make_base("llama"), dtype=torch.float32)


def losses_of(model, count=2):
    def losses():
        for seed in range(count):
            ids = torch.randint(5, 272, (4, 48), generator=torch.Generator().manual_seed(seed))
            yield answer_loss(model, {"input_ids": ids}, ids, 100.0)

    return losses


def true_gradients(model, names):
    weights = {name: model.get_submodule(name).weight for name in names}
    model.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    for loss in losses_of(model)():
        loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in weights.items()}
    model.requires_grad_(False)
    model.zero_grad(set_to_none=True)
    return gradients


def test_directions_capture_nearly_what_the_true_gradients_svd_captures(model):
    gradients = true_gradients(model, [name for group in GROUPS for name in group])
    rows = gradient_sketches(model, GROUPS, losses_of(model), rank=8, seed=0)
    for group in GROUPS:
        gradient = torch.cat([gradients[name] for name in group]).double()
        basis = rows[group[0]].double()
        torch.testing.assert_close(basis @ basis.t(), torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-5)
        singular = torch.linalg.svdvals(gradient)
        best = singular[:8].square().sum() / singular.square().sum()
        captured = (gradient @ basis.t()).square().sum() / gradient.square().sum()
        # A flat spectrum (random weights) is the hard case for a sketch of three columns a direction without power
        # iterations: it gets four fifths of the optimum. Random rows would get 8/64, a third of it.
        assert captured > 0.75 * best
        assert best > 0.3


def test_the_model_is_left_as_it_was(model):
    model.requires_grad_(False)
    gradient_sketches(model, GROUPS, losses_of(model), rank=4, seed=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("cached", [False, True])
def test_decoder_layers_are_recomputed_with_the_same_directions(model, cached, monkeypatch):
    """But where the caller's losses use a cache, which a layer must not write twice."""

    def losses():
        for seed in range(2):
            ids = torch.randint(5, 272, (4, 48), generator=torch.Generator().manual_seed(seed))
            yield model(input_ids=ids, labels=ids, use_cache=cached).loss

    everywhere = [[name] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)][:-1]
    seen = []
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda *call: seen.append(call))
    again = gradient_sketches(model, everywhere, losses, rank=4, seed=0)
    assert len(seen) == 2 * 2 * (1 if cached else 2)  # two passes, two batches, each layer twice
    assert not model.training
    assert not any("forward" in vars(module) for module in model.modules())
    monkeypatch.setattr(observed, "_outermost", lambda model: [])
    plain = gradient_sketches(model, everywhere, losses, rank=4, seed=0)
    assert len(seen) == 2 * 2 * (2 if cached else 3)
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_recomputed_layers_hold_no_inputs_until_their_backward_pass(monkeypatch):
    monkeypatch.setattr(sums, "_bytes", lambda tensor: memoryview(bytearray()))  # fake tensors have none
    transformers = import_transformers()
    transformers.LlamaForCausalLM  # noqa: B018
    peaks = []
    for found in (observed._outermost, lambda model: []):
        monkeypatch.setattr(observed, "_outermost", found)
        with fake_cuda(found=64) as counter, torch.device("cuda"):
            shapes = transformers.LlamaConfig(
                hidden_size=256, intermediate_size=512, num_attention_heads=4, num_hidden_layers=12, vocab_size=64
            )
            model = transformers.AutoModelForCausalLM.from_config(shapes, dtype=torch.bfloat16).eval()
            model.requires_grad_(False)

            def losses(model=model):
                ids = torch.zeros(4, 512, dtype=torch.int64)
                yield model(input_ids=ids, use_cache=False).logits.float().sum()

            groups = [[f"model.layers.{i}.mlp.down_proj"] for i in range(12)]
            counter.clear()
            held = counter.peak
            gradient_sketches(model, groups, losses, rank=8, seed=0)
            peaks.append(counter.peak - held)
    assert peaks[0] < peaks[1] / 3


def test_gradients_that_are_not_finite_are_refused_with_the_layer(model):
    model.requires_grad_(False)
    model.model.layers[1].self_attn.o_proj.weight.fill_(1e38)  # finite, and what comes out of it is not
    with pytest.raises(ConfigurationError, match="not finite before the first step") as refused:
        gradient_sketches(model, GROUPS, losses_of(model), rank=4, seed=3)
    assert GROUPS[0][0] in refused.value.why


def test_a_seed_fixes_the_directions(model):
    one, two = (gradient_sketches(model, GROUPS, losses_of(model), rank=4, seed=3) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_converted_layers_hold_the_directions(model):
    model.requires_grad_(False)
    groups, _ = convert_model(
        model,
        update_rule("live"),
        rank=8,
        initialisation=Initialisation.GRADIENT,
        seed=0,
        losses=losses_of(model),
    )
    for group in groups:
        a = group.layer.adapter_codes.float()
        unit = a / a.norm(dim=1, keepdim=True)
        # Orthonormal rows, rounded to E4M3: each product of two rows is off by some 3 % / sqrt(64) a term.
        torch.testing.assert_close(unit @ unit.t(), torch.eye(8), rtol=0, atol=0.05)


def test_conversion_without_losses_is_refused(model):
    with pytest.raises(ValueError, match="training losses"):
        convert_model(model, update_rule("live"), rank=8, initialisation=Initialisation.GRADIENT, seed=0)
