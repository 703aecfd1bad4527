"""Stacked experts as one tensor per expert: the same values under other names, and back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from language_models import ARCHITECTURES, build, write
from safetensors.torch import load_file, save_file

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.checkpoint.quantized.base import base_entries
from fp8pipe.models.checkpoint.rows import row_blocks
from fp8pipe.models.checkpoint.stacks import join_entries, join_stacks, split_stacks
from fp8pipe.models.checkpoint.tensors import weight_entries
from fp8pipe.models.language.base import check_base
from fp8pipe.models.language.unstacking import unstack_experts

# Families -> how many tensors more there are than stacks: two layers of gpt-oss with four stacks of four experts each;
# in the others gate and up are two of twelve tensors in place of two stacks, and one of Llama 4's layers is dense.
FAMILIES = {"gpt_oss": 2 * 4 * 3, "granitemoe": 2 * (12 - 2), "llama4": 12 - 2}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def base(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(ARCHITECTURES[family], tmp_path_factory.mktemp("stacks"))


def test_each_part_is_the_tensor_of_the_unstacked_model(base: Path, family: str) -> None:
    model = build(ARCHITECTURES[family])  # drawn as the one that was written
    unstack_experts(model)
    structure = check_base(base, "mine")
    assert structure.trainable  # nothing is missing, and shapes fit
    state, entries = model.state_dict(), base_entries(base)
    table = structure.naming.table(entries)
    assert {known.name for known in table.values()} == state.keys()
    for name, entry in entries.items():
        wanted = state[table[name].name]
        assert entry.shape == wanted.shape
        assert torch.equal(entry.read(), wanted), name
        assert torch.equal(entry.read_rows(range(1, 3)), wanted[1:3]), name
        assert (len(row_blocks(replace(entry, shape=(4096, 4096)))) == 1) is not entry.by_rows
    assert all(entry.by_rows for entry in entries.values()) == (family != "llama4")


def test_whole_stacks_come_back(base: Path, family: str) -> None:
    kind = {"llama4": "llama4_text"}.get(family, family)
    stored = weight_entries(base)
    entries = split_stacks(kind, stored)
    assert len(entries) == len(stored) + FAMILIES[family]
    assert join_entries(entries) == stored
    assert split_stacks("qwen3_moe", stored) == stored
    joined = join_stacks(kind, {name: entry.read() for name, entry in entries.items()})
    whole = load_file(base / "model.safetensors")
    assert joined.keys() == whole.keys()
    assert all(torch.equal(joined[name], whole[name]) for name in whole)


def test_tensors_are_stacked_in_the_order_of_the_experts() -> None:
    stack = torch.randn(12, 3, 2)  # more than ten: by their names 10 and 11 come before 2
    single = {f"a.experts.{number}.down_proj.weight": stack[number] for number in range(12)}
    shuffled = dict(sorted(single.items())) | {"a.router.weight": stack[0], "a.experts.0.gate_proj.weight": stack[1]}
    joined = join_stacks("gpt_oss", shuffled)
    assert joined.keys() == {"a.experts.down_proj", "a.router.weight", "a.experts.0.gate_proj.weight"}
    assert torch.equal(joined["a.experts.down_proj"], stack)
    assert join_stacks("mixtral", shuffled) == shuffled


def test_a_base_that_only_vllm_reads_is_refused(base: Path, tmp_path: Path) -> None:
    """transformers would load it with random experts, and say so in a log."""
    tensors = {name: entry.read() for name, entry in base_entries(base).items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    with pytest.raises(ConfigurationError, match=r"stored one by one") as caught:
        base_entries(tmp_path)
    assert ".experts.down_proj" in str(caught.value.why).partition("transformers loads")[2]
