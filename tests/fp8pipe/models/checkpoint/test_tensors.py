"""Index, shards, headers, names and digests of checkpoints."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.checkpoint.names import Naming, checkpoint_names
from fp8pipe.models.checkpoint.tensors import (
    header_entries,
    is_scale,
    model_parent,
    read_tensor,
    weight_entries,
    weight_files,
    write_index,
)

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards; the second holds a weight with a scale, under the bare model's name."""
    save_file({"model.a.weight": torch.ones(2, 3)}, tmp_path / SHARDS[0])
    save_file({"b.weight": torch.ones(4, 2), "b.weight_scale": torch.tensor(0.5)}, tmp_path / SHARDS[1])
    names = {"b.weight": SHARDS[1], "b.weight_scale": SHARDS[1], "model.a.weight": SHARDS[0]}
    write_index(tmp_path, names, 60)
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def test_shards_are_read_by_their_index(sharded: Path) -> None:
    assert [file.name for file in weight_files(sharded)] == list(SHARDS)
    entries = weight_entries(sharded)
    assert {name: (entry.shape, entry.size_bytes) for name, entry in entries.items()} == {
        "model.a.weight": ((2, 3), 24), "b.weight": ((4, 2), 32), "b.weight_scale": ((), 4)
    }  # fmt: skip
    assert float(read_tensor(entries["b.weight_scale"])) == 0.5
    assert [name for name in entries if is_scale(name, entries)] == ["b.weight_scale"]


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    save_file({"c.weight": torch.ones(1, 1)}, tmp_path / "model.safetensors")
    assert list(weight_entries(tmp_path)) == ["c.weight"]


DECISIVE = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    "preprocessor_config.json", "additional_chat_templates/tools.jinja",
)  # fmt: skip


def test_a_model_is_named_by_every_file_that_decides_what_it_answers(sharded: Path) -> None:
    (sharded / "additional_chat_templates").mkdir()
    for name in DECISIVE:
        (sharded / name).write_text("{}")
    parent = model_parent(sharded, "origin")
    names = sorted([*SHARDS, "model.safetensors.index.json", *DECISIVE])
    lines = "".join(f"{hashlib.sha256((sharded / name).read_bytes()).hexdigest()}  {name}\n" for name in names)
    assert parent.digest == parent.content == hashlib.sha256(lines.encode()).hexdigest()
    assert (parent.kind, parent.path, parent.outdated) == ("model", "origin", "")
    (sharded / "trainer_state.json").write_text("{}")  # of the training, not of the model
    assert model_parent(sharded, "origin") == parent
    for name in names:
        before = (sharded / name).read_bytes()
        (sharded / name).write_bytes(before + b"\n")
        assert model_parent(sharded, "origin").digest != parent.digest, name
        (sharded / name).write_bytes(before)
    (sharded / "chat_template.jinja").unlink()
    assert model_parent(sharded, "origin").digest != parent.digest


def test_what_cannot_be_read_is_named(sharded: Path) -> None:
    write_index(sharded, {"model.a.weight": SHARDS[1]}, 24)
    with pytest.raises(ConfigurationError, match="disagrees with its shards"):
        weight_entries(sharded)
    write_index(sharded, {"model.a.weight": "../x.safetensors"}, 24)
    with pytest.raises(ConfigurationError, match="points outside") as caught:
        weight_files(sharded)
    assert caught.value.fix
    for text in ("[]", '{"weight_map": ["model.a.weight"]}', "{}"):
        (sharded / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ConfigurationError, match="not a weight index") as caught:
            weight_files(sharded)
        assert "no JSON object weight_map" in caught.value.why
    (sharded / SHARDS[0]).write_bytes(b"no weights")
    with pytest.raises(ConfigurationError, match="not a complete safetensors file"):
        header_entries(sharded / SHARDS[0])
    (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(ConfigurationError, match="holds no weights") as caught:
        checkpoint_names(sharded, Naming(), ["a"])
    assert f"the first: {SHARDS[0]}" in caught.value.why
    assert "fetch model.safetensors.index.json" in caught.value.fix


def test_a_directory_with_two_sets_of_weights_is_refused_since_engines_differ_in_which_they_read(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    (sharded / "model.safetensors").write_bytes((sharded / SHARDS[0]).read_bytes())
    with pytest.raises(ConfigurationError, match="two sets of weights") as caught:
        weight_files(sharded)
    assert SHARDS[0] in caught.value.why
    for name in SHARDS:
        (sharded / name).unlink()
    assert weight_files(sharded) == [sharded / "model.safetensors"]  # the index is a leftover, and no engine reads it
    index.write_text('{"weight_map": {"model.a.weight": "model.safetensors"}}')
    assert weight_files(sharded) == [sharded / "model.safetensors"]


def test_weights_that_are_not_whole_are_refused_with_numbers(sharded: Path) -> None:
    first, index = sharded / SHARDS[0], sharded / "model.safetensors.index.json"
    whole, named = first.read_bytes(), index.read_text()
    first.write_bytes(whole[:-5])
    with pytest.raises(ConfigurationError, match="not a complete safetensors file") as caught:
        weight_entries(sharded)
    assert caught.value.why == f"it has {len(whole) - 5} of {len(whole)} bytes"
    first.unlink()
    with pytest.raises(ConfigurationError, match="are not complete") as caught:
        weight_entries(sharded)
    assert caught.value.why == f"1 of {len(SHARDS)} files are missing: {SHARDS[0]}"
    first.write_bytes(whole)
    name = next(iter(json.loads(named)["weight_map"]))
    index.write_text(named.replace('"weight_map": {', f'"weight_map": {{"{name}": "{SHARDS[1]}",'))
    with pytest.raises(ConfigurationError, match="not a weight index") as caught:
        weight_entries(sharded)
    assert caught.value.why == f"1 name(s) occur twice, the first: {name}"
    index.write_text(named)
    (sharded / SHARDS[1]).write_bytes(whole)
    with pytest.raises(ConfigurationError, match="contradict each other") as caught:
        weight_entries(sharded)
    assert f"in {SHARDS[1]} and {SHARDS[0]}" in caught.value.why


def test_a_header_that_names_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    file, entry = tmp_path / "model.safetensors", '"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
    header = f"{{{entry},{entry}}}".encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"data")
    with pytest.raises(ConfigurationError, match="not a complete safetensors file") as caught:
        header_entries(file)
    assert "occur twice, the first: " in caught.value.why
