"""Stacked experts as one tensor per expert: the same bytes under other names, and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from language_models import ARCHITECTURES, build, write
from safetensors.torch import load_file, save_file

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.checkpoint.quantized.base import base_entries
from fp8pipe.models.checkpoint.stacks import join_entries, join_stacks, split_stacks
from fp8pipe.models.checkpoint.tensors import weight_entries
from fp8pipe.models.language.base import check_base
from fp8pipe.models.language.experts import unstack_experts


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(ARCHITECTURES["gpt_oss"], tmp_path_factory.mktemp("stacks"))


def test_each_part_is_the_tensor_of_the_unstacked_model(base: Path) -> None:
    model = build(ARCHITECTURES["gpt_oss"])
    model.load_state_dict(load_file(base / "model.safetensors"))
    unstack_experts(model)
    state, entries = model.state_dict(), base_entries(base)
    assert entries.keys() == state.keys()
    for name, entry in entries.items():
        assert entry.shape == state[name].shape
        assert torch.equal(entry.read(), state[name]), name
        assert torch.equal(entry.read_rows(range(1, 3)), state[name][1:3]), name
    assert check_base(base, "mine").trainable  # nothing is missing, and shapes fit


def test_whole_stacks_come_back(base: Path) -> None:
    stored = weight_entries(base)
    entries = split_stacks("gpt_oss", stored)
    assert len(entries) == len(stored) + 2 * 4 * 3  # two layers, four stacks, four experts in place of each
    assert join_entries(entries) == stored
    assert split_stacks("llama4_text", stored) == stored


def test_tensors_are_stacked_in_the_order_of_the_experts() -> None:
    stack = torch.randn(12, 3, 2)  # more than ten: by their names 10 and 11 come before 2
    single = {f"a.experts.{number}.down_proj.weight": stack[number] for number in range(12)}
    shuffled = dict(sorted(single.items())) | {"a.router.weight": stack[0], "a.experts.0.gate_proj.weight": stack[1]}
    joined = join_stacks(shuffled)
    assert joined.keys() == {"a.experts.down_proj", "a.router.weight", "a.experts.0.gate_proj.weight"}
    assert torch.equal(joined["a.experts.down_proj"], stack)


def test_a_base_that_only_vllm_reads_is_refused(base: Path, tmp_path: Path) -> None:
    """transformers would load it with random experts, and say so in a log."""
    tensors = {name: entry.read() for name, entry in base_entries(base).items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(ConfigurationError, match=r"stored one by one") as caught:
        base_entries(tmp_path)
    assert "transformers loads model.layers.0.mlp.experts.down_proj" in str(caught.value.why)
