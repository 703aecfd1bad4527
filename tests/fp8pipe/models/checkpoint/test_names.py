"""Names of checkpoints and of models, against transformers' own loading and saving."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from language_models import ARCHITECTURES, build
from safetensors.torch import load_file, save_file

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.checkpoint.names import ModelName, Naming, checkpoint_names, naming_of

RENAMED = ("gpt_neox", "gemma3_mm", "qwen25vl", "mixtral", "llama")


@pytest.mark.parametrize("name", RENAMED)
def test_what_transformers_saves_is_found_in_what_it_loads(name: str, tmp_path: Path) -> None:
    model = build(ARCHITECTURES[name])
    model.save_pretrained(tmp_path)
    stored, state = load_file(tmp_path / "model.safetensors"), model.state_dict()
    table = naming_of(model, state).table(stored)
    assert list(table) == list(stored)
    for theirs, known in table.items():
        assert known.name in state, theirs
        if known.whole:  # the values tell whether it is that tensor
            assert torch.equal(stored[theirs], state[known.name]), theirs
            assert known.renamed == (theirs != known.name)
    joined = {known.name for known in table.values() if not known.whole}
    assert all("experts" in tensor for tensor in joined)
    assert bool(joined) == (name == "mixtral")
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    assert {known.name for known in table.values()} == state.keys() - tied


def test_the_base_models_prefix_may_be_absent_or_too_much_and_scales_go_along() -> None:
    naming = Naming("model", frozenset({"model.a.weight", "head.weight"}), frozenset({"model.a", "head"}))
    assert naming.table(["a.weight", "a.weight_scale", "model.head.weight", "b.weight"]) == {
        "a.weight": ModelName("model.a.weight"), "a.weight_scale": ModelName("model.a.weight_scale"),
        "model.head.weight": ModelName("head.weight"), "b.weight": ModelName("b.weight"),
    }  # fmt: skip


def test_names_for_writing_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a.weight": torch.ones(2, 3), "model.b.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    known = frozenset({"model.a.weight", "model.b.weight"})
    naming = Naming("model", known, frozenset({"model.a", "model.b"}))
    assert checkpoint_names(tmp_path, naming, ["model.a", "model.b"]) == {"model.a": "a", "model.b": "model.b"}
    with pytest.raises(ConfigurationError, match="the weight of c is not"):
        checkpoint_names(tmp_path, naming, ["c"])
