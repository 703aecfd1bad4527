"""FALQON as a method: every rule goes on from its state with the bits of a run that was not cut."""

from __future__ import annotations

import pytest
import torch

from fp8pipe.models.compat import import_transformers
from pipeline.falqon.base_files import BaseFiles
from pipeline.falqon.method import FalqonMethod
from pipeline.falqon.rules import RULES, Initialisation


def prepared(base, rule, folder):
    """A model of `base`, and its method: four rows a flush of layers that have 32 or more, so that it matters which."""
    model = import_transformers().AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    method = FalqonMethod(rule, rank=8, rows=4, initialisation=Initialisation.RANDOM, seed=3)
    method.prepare(model, BaseFiles(folder, "key"))
    return model, method


def train(model, method, steps):
    """Steps along the sign of the gradient: large enough to move codes, and without a state like AdamW's."""
    for step in steps:
        tokens = torch.randint(0, 272, (2, 16), generator=torch.Generator().manual_seed(step))
        model(input_ids=tokens, labels=tokens).loss.backward()
        for b in method.parameters().values():
            b.data -= b.grad.sign()
            b.grad = None
        method.after_step(step, measure=False)


def cloned(state):
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.mark.parametrize("name", RULES)
def test_a_method_restored_from_its_state_goes_on_with_the_same_bits(name, make_base, tmp_path):
    base, rule = make_base(num_hidden_layers=1), RULES[name]
    model, whole = prepared(base, rule, tmp_path / "files")
    start = {key: layer.codes.clone() for key, layer in whole.layers.items()}
    train(model, whole, (1, 2))
    middle = cloned(whole.step_state())
    train(model, whole, (3, 4))
    torch.manual_seed(99)  # what the process has drawn so far is not part of a checkpoint
    model, resumed = prepared(base, rule, tmp_path / "files")
    assert all(
        torch.equal(start[key].view(torch.uint8), layer.codes.view(torch.uint8))
        for key, layer in resumed.layers.items()
    )  # no step changes the files
    resumed.load_step_state(middle)
    train(model, resumed, (3, 4))
    for layer, other in zip(whole.layers.values(), resumed.layers.values(), strict=True):
        assert torch.equal(layer.codes.view(torch.uint8), other.codes.view(torch.uint8))
        assert torch.equal(layer.lora_B, other.lora_B)
        assert layer.lora_A is None or torch.equal(layer.lora_A, other.lora_A)
    # A flush at each step changes codes of W, and training A its codes; both then have to follow from the state.
    for part, changes in (("weight_codes", rule.flush_every_step), ("adapter_codes", rule.trains_a)):
        moved = [not torch.equal(_rows(start[key], layer, part), getattr(layer, part).view(torch.uint8))
                 for key, layer in whole.layers.items()]  # fmt: skip
        assert all(moved) if changes else not any(moved)


def _rows(codes, layer, part):
    rows = codes.view(torch.uint8)
    return rows[: layer.out_features] if part == "weight_codes" else rows[layer.out_features :]
