"""A model read a part at a time gives, bit for bit, what the whole one gives, whatever its architecture."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_decoders import DECODERS, VOCABULARY, tiny_decoder
from torch import Tensor

from fp8pipe.core import plan
from fp8pipe.core.errors import OutOfMemoryError
from fp8pipe.models.language.parts import PART_BYTES, PartedModel, StoredWeights
from fp8pipe.models.language.structure import build_model

TEXTS = [torch.arange(3, 3 + length)[None] * 7 % VOCABULARY for length in (5, 21)]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Tensor]]]:
    """A tiny decoder's directory, and its tensors by the names of its checkpoint."""

    def save(name: str) -> tuple[Path, dict[str, Tensor]]:
        root = tmp_path_factory.mktemp(name)
        tiny_decoder(name).save_pretrained(root)
        return root, load_file(root / "model.safetensors")

    return save


def parted(root: Path, state: dict[str, Tensor], read: list[str] | None = None, part_bytes: int = 1) -> PartedModel:
    def get(name: str) -> Tensor:
        if read is not None:
            read.append(name)
        return state[name]

    return PartedModel(root, StoredWeights({k: tuple(v.shape) for k, v in state.items()}, get), part_bytes)


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
    model = parted(root, state)
    assert len(model.parts) == 4, model.parts  # the embedding, two layers, the head
    for ours, ids in zip(model.run(asked(model)), TEXTS, strict=True):
        assert torch.equal(ours, logits(whole, ids))
    assert model.parts  # it was not read whole


def test_a_tensor_is_read_once_for_all_texts_and_a_small_model_once_for_all_runs(saved: Any) -> None:
    root, state = saved("gemma3")  # whose head is the embedding
    for part_bytes, times, tied in (1, 2, 4), (PART_BYTES, 1, 1):
        read: list[str] = []
        model = parted(root, state, read, part_bytes)
        for _ in range(2):
            model.run(asked(model))
        counts = {name: read.count(name) for name in state}
        assert counts.pop("model.embed_tokens.weight") == tied
        assert counts.pop("model.norm.weight") == 1
        assert set(counts.values()) == {times}


def test_no_more_than_a_part_and_what_stays_is_in_memory(saved: Any) -> None:
    root, state = saved("llama")
    alive: dict[int, int] = {}
    peaks = [0]

    def read(name: str) -> Tensor:
        array = state[name].numpy().copy()  # lives as long as the tensor's memory
        alive[id(array)] = array.nbytes
        weakref.finalize(array, alive.pop, id(array))
        peaks[0] = max(peaks[0], sum(alive.values()))
        return torch.from_numpy(array)

    shapes = {name: tuple(value.shape) for name, value in state.items()}
    model = PartedModel(root, StoredWeights(shapes, read), part_bytes=1)
    model.run(asked(model))
    sizes = {part: sum(v.nbytes for k, v in state.items() if k.startswith(f"{part}.")) for (part,) in model.parts}
    stays = sum(value.nbytes for value in state.values()) - sum(sizes.values())
    assert peaks[0] == max(sizes.values()) + stays


def test_changed_numbers_are_changed_in_every_part(saved: Any) -> None:
    root, state = saved("gemma3")
    results = []
    for part_bytes in 1, PART_BYTES:
        model = parted(root, state, part_bytes=part_bytes)
        model.run(asked(model))  # some part is there
        model.change(lambda module, key, numbers: numbers.bfloat16() if "norm" not in module else numbers.half())
        assert model.model.dtype is torch.bfloat16
        results.append(model.run(asked(model)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@torch.inference_mode()
def read_elsewhere(model: PartedModel, ids: Tensor) -> Tensor:
    """As code does that multiplies by a weight without calling its module."""
    weight: Tensor = model.model.get_submodule("model.layers.1.mlp.up_proj").get_parameter("weight")
    return logits(model.model, ids) * weight.sum()


def test_a_model_that_reads_a_weight_elsewhere_is_read_whole_and_says_so(saved: Any, caplog: Any) -> None:
    root, state = saved("llama")
    model = parted(root, state)
    (ours,) = model.run([partial(read_elsewhere, model, TEXTS[0])])
    whole = build_model(root, state, torch.float32)
    assert torch.equal(ours, logits(whole, TEXTS[0]) * state["model.layers.1.mlp.up_proj.weight"].sum())
    assert "LlamaForCausalLM is read whole" in caplog.text


def test_such_a_model_is_refused_where_it_does_not_fit(saved: Any, monkeypatch: Any) -> None:
    model = parted(*saved("llama"))
    monkeypatch.setattr(plan, "memory_bytes", lambda: 1000)
    monkeypatch.setattr(plan, "swap_bytes", lambda: 0)
    with pytest.raises(OutOfMemoryError, match="LlamaForCausalLM, which cannot be read a part at a time"):
        model.run([partial(read_elsewhere, model, TEXTS[0])])
