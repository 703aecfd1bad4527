"""A model read a part at a time gives, bit for bit, what the whole one gives, whatever its architecture."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from held_weights import held_weights
from safetensors.torch import load_file
from tiny_decoders import DECODERS, VOCABULARY, tiny_decoder
from torch import Tensor, nn

from fp8pipe.models.checkpoint.stacks import split_stacks
from fp8pipe.models.checkpoint.tensors import read_tensor, weight_entries
from fp8pipe.models.language.parts import PART_BYTES, PartedModel, StoredWeights
from fp8pipe.models.language.structure import build_model
from fp8pipe.models.language.unstacking import unstack_experts

TEXTS = [torch.arange(3, 3 + length)[None] * 7 % VOCABULARY for length in (5, 21)]
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Tensor]]]:
    """A tiny decoder's directory, and its tensors by the names of its checkpoint."""

    def save(name: str) -> tuple[Path, dict[str, Tensor]]:
        root = tmp_path_factory.mktemp(name)
        tiny_decoder(name).save_pretrained(root)
        return root, load_file(root / "model.safetensors")

    return save


def asked(model: PartedModel) -> list[Any]:
    return [partial(logits, model.model, ids) for ids in TEXTS]


@torch.inference_mode()
def logits(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids).logits
    return found


@pytest.mark.parametrize("name", DECODERS)
def test_logits_are_those_of_the_whole_model_bit_for_bit(saved: Any, name: str) -> None:
    root, state = saved(name)
    whole = build_model(root, state, torch.float32)
    unstack_experts(whole)
    model = PartedModel(root, held_weights(state), part_bytes=1)
    owners = [{tensor.rpartition(".")[0] for tensor in part} for part in model.parts]
    assert all(len(modules) == 1 for modules in owners)  # every module with weights is a part
    assert len(owners) == len(set().union(*owners)) > 12
    for ours, ids in zip(model.run(asked(model)), TEXTS, strict=True):
        assert torch.equal(ours, logits(whole, ids))


def test_experts_of_a_stack_are_parts_if_they_are_given_one_by_one(saved: Any) -> None:
    root, state = saved("gpt_oss")
    single = {name: read_tensor(entry) for name, entry in split_stacks("gpt_oss", weight_entries(root)).items()}
    model = PartedModel(root, held_weights(single), part_bytes=1)
    experts = [f"model.layers.1.mlp.experts.3.{leaf}" for leaf in ("gate_up_proj", "down_proj")]
    assert all([f"{name}.weight", f"{name}.bias"] in model.parts for name in experts)
    whole = build_model(root, state, torch.float32)
    unstack_experts(whole)
    for ours, ids in zip(model.run(asked(model)), TEXTS, strict=True):
        assert torch.equal(ours, logits(whole, ids))


@pytest.mark.parametrize(("part_bytes", "times"), [(1, 2), (PART_BYTES, 1)])
def test_a_part_is_read_once_for_all_texts_and_a_small_model_once_for_all_runs(
    saved: Any, part_bytes: int, times: int
) -> None:
    root, state = saved("gemma3")
    read: list[str] = []
    model = PartedModel(root, held_weights(state, read), part_bytes)
    assert (len(model.parts) == 1) == (part_bytes == PART_BYTES)
    for _ in range(2):
        model.run(asked(model))
    counts = {name: read.count(name) for name in state}
    assert counts.pop("model.embed_tokens.weight") == 2 * times  # it is the head, too
    assert set(counts.values()) == {times}


def test_what_no_text_uses_is_never_read(saved: Any) -> None:
    root, state = saved("mixtral")
    read: list[str] = []
    model = PartedModel(root, held_weights(state, read), part_bytes=1)
    (expert,) = (module for name, module in model.model.named_modules() if name.endswith("layers.1.mlp"))
    expert.forward = lambda hidden: hidden  # type: ignore[assignment,method-assign]
    model.run(asked(model))
    unread = state.keys() - set(read)
    assert len(unread) == 13  # a router, and three projections of four experts
    assert all(name.startswith("model.layers.1.block_sparse_moe") for name in unread)


def test_no_more_than_a_part_is_in_memory(saved: Any) -> None:
    root, state = saved("llama")
    most = 4 * sum(value.numel() for name, value in state.items() if ".layers.0." in name)
    weights, peaks = held_weights(state), [0]

    def blocks(name: str) -> Any:
        held = [p for p in model.model.parameters() if type(p) is nn.Parameter]
        peaks[0] = max(peaks[0], sum(p.nbytes for p in held) + state[name].nbytes)
        return weights.blocks(name)

    model = PartedModel(root, StoredWeights(weights.headers, blocks), part_bytes=most)
    model.run(asked(model))
    assert max(map(len, model.parts)) == 9  # all of a layer
    assert most / 2 < peaks[0] <= most


def test_changed_values_are_changed_in_every_part(saved: Any) -> None:
    root, state = saved("gemma3")
    results = []
    for part_bytes in 1, PART_BYTES:
        model = PartedModel(root, held_weights(state), part_bytes)
        model.run(asked(model))  # some part is there
        model.change(lambda module, key, values: values.bfloat16() if "norm" not in module else values.half())
        assert model.model.dtype is torch.bfloat16
        results.append(model.run(asked(model)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def rounded(module: str, key: str, values: Tensor) -> Tensor:
    return values if "down_proj" in module else values.bfloat16().float()


@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_each_parameter_is_changed_as_that_of_its_own_module(saved: Any, name: str) -> None:
    """Also what stays in memory, such as the stacked experts of gpt-oss."""
    root, state = saved(name)
    model, whole = PartedModel(root, held_weights(state), part_bytes=1), build_model(root, state, torch.float32)
    unstack_experts(whole)
    model.change(rounded)
    for place, module in whole.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            parameter.data = rounded(place, key, parameter.data)
    for ours, ids in zip(model.run(asked(model)), TEXTS, strict=True):
        assert torch.equal(ours, logits(whole, ids))


def test_a_weight_that_was_taken_before_it_was_there_is_read_once(saved: Any) -> None:
    root, state = saved("llama")
    read: list[str] = []
    kept = PartedModel(root, held_weights(state, read), part_bytes=1).model.get_parameter(UP)
    for _ in range(2):
        assert torch.equal(kept + 0.0, state[UP])
    assert read.count(UP) == 1


@torch.inference_mode()
def out_of_turn(model: nn.Module, ids: Tensor) -> Tensor:
    """As code does that multiplies by a weight of another layer."""
    return logits(model, ids) * model.get_parameter(UP).sum()


def test_a_weight_that_is_read_out_of_turn_is_read(saved: Any) -> None:
    root, state = saved("llama")
    model = PartedModel(root, held_weights(state), part_bytes=1)
    whole = build_model(root, state, torch.float32)
    for ours, ids in zip(model.run([partial(out_of_turn, model.model, ids) for ids in TEXTS]), TEXTS, strict=True):
        assert torch.equal(ours, logits(whole, ids) * state[UP].sum())
