"""Packed examples are kept apart, whatever the architecture; where they cannot be, they are not packed.

The oracle is the model itself: an example in a row of its own.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from tiny_decoders import DECODERS, VOCABULARY, tiny_decoder
from torch import nn

from fp8pipe.artifact.kinds import PackingFacts
from fp8pipe.core.config import build_config
from fp8pipe.models.language.text import IGNORED, Encoded
from pipeline.finetune.attention import use_matmul_attention
from pipeline.finetune.batches import Batches
from pipeline.finetune.config import FinetuneConfig
from pipeline.finetune.loss import heldout_loss, model_inputs
from pipeline.finetune.packing import find_packing, give_masks, packing_warning
from pipeline.finetune.plan import plan_finetune
from pipeline.finetune.stage import finetune

WIDTH = 128
# What transformers' classes do today; a class that learns to look at positions moves to the first.
BY_POSITION = {"llama", "gpt2", "gptj", "mistral", "gemma2", "gemma3", "gpt_neo", "llama4", "mixtral"}
BY_MASK = {"gpt_oss", "opt", "falcon", "mpt"}


def _encoded() -> list[Encoded]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(6, 60, (24,), generator=generator).tolist()
    texts = [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return [Encoded(text, [IGNORED] * 3 + text[3:]) for text in texts]


ENCODED = _encoded()


def packed(batch_size=2):
    return Batches(ENCODED, batch_size, WIDTH, 0, True, 0)


def loss_of(model, batches):
    return heldout_loss(model, (batches.at(step) for step in range(len(batches))), "cpu")


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_an_example_in_a_row_is_what_it_is_alone(name):
    model, batches = tiny_decoder(name), packed()
    found = find_packing(model, batches.at(0))
    assert found.how == ("positions" if name in BY_POSITION else "mask" if name in BY_MASK else "off")
    assert bool(packing_warning(found)) == (found.how == "off")
    assert (found.moved > 1e-3) == (found.how != "positions")
    if found.how == "off":
        batches = batches.unpacked()
        assert batches.rows == len(ENCODED)
    with give_masks(model) if found.how == "mask" else nullcontext():
        loss = loss_of(model, batches)
        batch = batches.at(0)
        rows = model(**model_inputs(batch, "cpu"), use_cache=False).logits
    starts = (batch.position_ids == 0).nonzero().tolist()
    for index in batch.examples:
        ids = torch.tensor(ENCODED[index].input_ids)
        row, at = next((row, at) for row, at in starts if torch.equal(batch.input_ids[row, at : at + len(ids)], ids))
        alone = model(input_ids=ids[None], use_cache=False).logits[0]
        # Sums in another order move fp32 logits by some 1e-6 of the largest.
        torch.testing.assert_close(rows[row, at : at + len(ids)], alone, rtol=0, atol=1e-5 * float(alone.abs().max()))
    assert loss == pytest.approx(loss_of(model, batches.unpacked()), abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral", "falcon", "jamba", "lfm2"])
def test_the_probe_tells_in_bf16_and_with_the_attention_of_training_too(name):
    model = copy.deepcopy(tiny_decoder(name)).to(torch.bfloat16)
    use_matmul_attention(model)
    found = find_packing(model, packed().at(0))
    assert found.how == ("positions" if name in BY_POSITION else "mask" if name in BY_MASK else "off")


def weak_state(module, args, output):
    """A hundredth of the mean of all that came before, whoever's it is."""
    count = torch.arange(1, output.shape[1] + 1)[None, :, None]
    return output + 0.01 * output.cumsum(1) / count


def far_sight(module, args, output):
    """Each token sees the one that is 100 places before it, and nothing nearer."""
    return output + nn.functional.pad(output, (0, 0, 100, 0))[:, : output.shape[1]]


@pytest.mark.parametrize("leak", [weak_state, far_sight])
def test_a_leak_is_seen_however_weak_or_far(leak):
    model = copy.deepcopy(tiny_decoder("llama"))
    model.model.layers[0].register_forward_hook(leak)
    found = find_packing(model, packed().at(0))
    assert found.how == "off"
    assert "with a mask per example the factor of another neighbour" in found.reason


def test_small_weights_hide_no_leak():
    model = copy.deepcopy(tiny_decoder("bloom"))
    for layer in model.transformer.h:
        layer.self_attention.dense.weight.data *= 1e-3
    assert find_packing(model, packed().at(0)).how == "off"


def test_where_nothing_can_be_told_nothing_is_packed():
    model = copy.deepcopy(tiny_decoder("llama"))
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    found = find_packing(model, packed().at(0))
    assert (found.how, found.moved) == ("off", None)
    assert "no token affected a later one" in found.reason


def test_the_probe_leaves_model_and_random_numbers_as_they_were():
    model = tiny_decoder("opt")
    before, state = torch.random.get_rng_state(), {n: p.clone() for n, p in model.named_parameters()}
    find_packing(model.train(), packed().at(0))
    assert model.training
    model.eval()
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(p, state[n]) for n, p in model.named_parameters())
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("longest", [1, 2, 7, 128])
def test_the_probe_takes_rows_of_any_shape(longest):
    example = Encoded([5] * longest + [6], [IGNORED] * longest + [6])
    batches = Batches([example] * 3, 2, longest + 1, 0, True, 0)
    assert find_packing(tiny_decoder("gpt2"), batches.at(0)).how == "positions"


@pytest.fixture
def saved(make_base):
    """A directory with the tiny decoder of a name and a tokenizer."""

    def save(name):
        base = make_base("llama")
        copy.deepcopy(tiny_decoder(name)).to(torch.bfloat16).save_pretrained(base)
        return base

    return save


def settings(base, data, **changes):
    values = {
        "model": str(base), "data": str(data), "rank": 8, "steps": 2, "batch_size": 2, "sequence_length": 96,
        "warmup_steps": 1, "evaluate_every": 0, "save_every": 0, "final_merge_batches": 2,
    }  # fmt: skip
    return build_config(FinetuneConfig, values | changes)


@pytest.mark.parametrize(("name", "how"), [("opt", "mask"), ("bloom", "off")])
def test_a_run_says_how_it_kept_examples_apart(saved, pairs, tmp_path, name, how):
    manifest = finetune(settings(saved(name), pairs), tmp_path / "out").manifest
    assert manifest.details.packing.how == how
    told = [warning for warning in manifest.warnings if "packing is off" in warning]
    assert told == [packing_warning(manifest.details.packing)] * (how == "off")
    again = finetune(settings(saved(name), pairs, packing=False), tmp_path / "single").manifest
    assert again.details.packing == PackingFacts(how="off")
    assert not any("packing is off" in warning for warning in again.warnings)
    if how == "off":  # the same run, but for the warning
        assert again.details.heldout_loss == manifest.details.heldout_loss
    else:
        assert again.details.heldout_loss.untuned == pytest.approx(manifest.details.heldout_loss.untuned, rel=1e-2)


def test_a_dry_run_says_it_beforehand(saved, pairs, tmp_path):
    plan = plan_finetune(settings(saved("bloom"), pairs), tmp_path / "out")
    assert plan.facts["packing"].startswith("off")
    assert any("packing is off" in note for note in plan.notes)
