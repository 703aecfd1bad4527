"""Experts as FALQON layers: a layer of each expert's own, and nothing learned where no token went."""

from __future__ import annotations

import pytest
import torch
from language_models import ARCHITECTURES
from mixtures import IDS, RANK, first_experts, loss_of, method_of, mixture, never_to

from fp8pipe.models.language.experts import UnstackedExperts
from pipeline.falqon.convert import convert_model
from pipeline.falqon.layer import FalqonLinear
from pipeline.falqon.method import FalqonMethod
from pipeline.falqon.rules import Initialisation, update_rule
from pipeline.finetune.loss import answer_loss


def prepared(family: str) -> tuple[FalqonMethod, UnstackedExperts, torch.Tensor]:
    """A method with live B that is not zero, the experts of the first layer, and inputs for them."""
    model, method = mixture(family), method_of("live")
    method.prepare(model)
    for layer in method.layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.02)
    return method, first_experts(model), torch.randn(7, 64, dtype=torch.bfloat16)


def test_the_expert_layer_is_its_layers_run_one_by_one() -> None:
    method, experts, x = prepared("mixtral")
    dense = torch.zeros_like(x)
    for number in range(4):
        joined, down = (
            method.layers[f"model.layers.0.mlp.experts.{number}.{leaf}"] for leaf in ("gate_proj", "down_proj")
        )
        gate, up = joined.forward_parts(x, joined.parts)
        dense += down(torch.nn.functional.silu(gate) * up) * 0.25
    found = experts(x, torch.arange(4).expand(7, 4), torch.full((7, 4), 0.25, dtype=torch.bfloat16))
    assert torch.equal(found, dense)


def test_an_expert_of_a_stack_is_two_layers_with_biases() -> None:
    """gpt-oss: gate and up are one layer, transposed in the checkpoint, and interleaved."""
    method, experts, x = prepared("gpt_oss")
    dense = torch.zeros_like(x)
    for number in range(4):
        joined, down = (
            method.layers[f"model.layers.0.mlp.experts.{number}.{leaf}"] for leaf in ("gate_up_proj", "down_proj")
        )
        assert joined.bias is not None
        both = joined(x)
        gate, up = both[:, ::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
        dense += down((up + 1) * (gate * torch.sigmoid(gate * 1.702))) * 0.25
    found = experts(x, torch.arange(4).expand(7, 4), torch.full((7, 4), 0.25, dtype=torch.bfloat16))
    assert torch.equal(found, dense)
    weights = method.deployed_weights()
    assert weights["model.layers.0.mlp.experts.1.gate_up_proj"].values.shape == (64, 192)  # as the checkpoint has it


@pytest.mark.parametrize(
    ("family", "rule"),
    [("mixtral", "live"), ("mixtral", "live-flush"), ("mixtral", "released"), ("granitemoe", "live"),
     ("llama4", "live-flush")],
)  # fmt: skip
def test_experts_without_a_token_keep_their_codes_and_others_do_not(family: str, rule: str) -> None:
    model = mixture(family)
    never_to(model, 1)
    method = method_of(rule)
    method.prepare(model)
    before = {name: layer.weight_codes.clone() for name, layer in method.layers.items()}
    optimizer = torch.optim.AdamW(method.parameters().values(), lr=0.05, weight_decay=0.1)
    model.train()
    for step in range(3):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.after_step(step, measure=False)
    method.finish(model, lambda: [{"input_ids": IDS}])
    kept = {name for name, layer in method.layers.items()
            if torch.equal(before[name].view(torch.uint8), layer.weight_codes.view(torch.uint8))}  # fmt: skip
    assert kept == {name for name in method.layers if ".experts.1." in name}
    assert all(layer.lora_B.shape[1] == RANK for layer in method.layers.values())
    assert len(method.deployed_weights()) == ARCHITECTURES[family].trained


def test_the_gradient_initialisation_says_which_experts_it_knows_nothing_of(caplog: pytest.LogCaptureFixture) -> None:
    model = mixture()
    never_to(model, 2)
    groups, _ = convert_model(
        model, update_rule("live"), RANK, Initialisation.GRADIENT, 0, losses=lambda: [loss_of(model)]
    )
    (told,) = [message for message in caplog.messages if "no token" in message]
    assert "4 layer(s)" in told  # gate with up, and down, of two layers
    assert "experts.2." in told
    layers = {group.name: group.layer for group in groups}
    for name, layer in layers.items():
        assert isinstance(layer, FalqonLinear)
        assert torch.linalg.matrix_rank(layer.adapter_codes.float()) == RANK, name


def test_the_auxiliary_loss_is_the_models_own() -> None:
    plain, asked = mixture(), mixture(output_router_logits=True, router_aux_loss_coef=0.5)
    with torch.no_grad():
        outputs = asked(input_ids=IDS, labels=IDS)
        plain_outputs = plain(input_ids=IDS, labels=IDS)
        theirs = outputs.loss - plain_outputs.loss
        assert float(theirs) > 0.1
        for model in (plain, asked):
            model.train()
        answers = float(IDS[:, 1:].numel())
        ours = answer_loss(asked, {"input_ids": IDS}, IDS, answers) - answer_loss(
            plain, {"input_ids": IDS}, IDS, answers
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=0)  # bf16 logits are summed in another order
        asked.eval()
        assert torch.equal(
            answer_loss(asked, {"input_ids": IDS}, IDS), answer_loss(plain.eval(), {"input_ids": IDS}, IDS)
        )
