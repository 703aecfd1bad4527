"""Checkpoints: whole or absent, rotated, refused for another configuration, and complete for the optimizer."""

from __future__ import annotations

import pytest
import torch

from fp8pipe.core.errors import BadArtifactError, ConfigurationError
from pipeline.finetune.checkpoint import CheckpointStore, optimizer_tensors, restore_optimizer


def test_only_the_newest_are_kept(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    for step in (10, 20, 30):
        store.save(step, {"b": torch.full((2,), float(step))}, {"history": []})
    assert store.steps() == [20, 30]
    tensors, state = store.load(30)
    assert tensors["b"].tolist() == [30.0, 30.0]
    assert state["step"] == 30


def test_a_checkpoint_cut_short_does_not_count(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    store.save(10, {"b": torch.ones(2)}, {})
    torn = tmp_path / "step-00000020"
    torn.mkdir()
    (torn / "state.safetensors").write_bytes(b"\x00" * 9)
    assert store.steps() == [10]


def test_a_damaged_checkpoint_is_named(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    folder = store.save(10, {"b": torch.ones(2)}, {})
    (folder / "state.safetensors").write_bytes(b"nothing")
    with pytest.raises(BadArtifactError, match="step-00000010") as error:
        store.load(10)
    assert "checkpoint before it" in error.value.fix


def test_resuming_with_another_configuration_names_the_fields(tmp_path):
    store = CheckpointStore(tmp_path / "c", keep=2)
    store.begin({"rank": 8, "seed": 0}, {"codes": torch.zeros(1)})
    assert store.started()
    store.check_config({"rank": 8, "seed": 0})
    with pytest.raises(ConfigurationError, match="another configuration") as error:
        store.check_config({"rank": 16, "seed": 0, "rows": 4})
    assert "rank: 8 then, 16 now" in error.value.why
    assert "rows: None then, 4 now" in error.value.why
    assert "seed" not in error.value.why


def test_resuming_with_another_input_names_the_file(tmp_path):
    store = CheckpointStore(tmp_path / "c", keep=2)
    store.begin({"rank": 8}, {"codes": torch.zeros(1)}, {"data.jsonl": "aa"})
    store.check_config({"rank": 8}, {"data.jsonl": "aa"})
    for now in ({"data.jsonl": "bb"}, {}):
        with pytest.raises(ConfigurationError, match=r"data\.jsonl changed") as error:
            store.check_config({"rank": 8}, now)
        assert "sha256 aa then" in error.value.why


@pytest.mark.parametrize("build", ["adamw", "adamw-8bit"])
def test_restored_optimizer_makes_the_same_next_step(tmp_path, build):
    def fresh():
        torch.manual_seed(0)
        # bitsandbytes keeps tensors under 4096 values in fp32: larger, so that the 8-bit state is what is tested.
        parameter = torch.nn.Parameter(torch.randn(96, 64))
        if build == "adamw":
            return parameter, torch.optim.AdamW([parameter], lr=0.1, fused=True)
        bitsandbytes = pytest.importorskip("bitsandbytes")
        return parameter, bitsandbytes.optim.AdamW8bit([parameter], lr=0.1)

    def step(parameter, optimizer, seed):
        parameter.grad = torch.randn(96, 64, generator=torch.Generator().manual_seed(seed))
        optimizer.step()

    one, first = fresh()
    for seed in range(3):
        step(one, first, seed)
    store = CheckpointStore(tmp_path, keep=1)
    store.save(3, {"b": one.detach()} | optimizer_tensors(first, {one: "b"}), {})
    two, second = fresh()
    tensors, _ = store.load(3)
    two.data.copy_(tensors["b"])
    restore_optimizer(second, {two: "b"}, tensors)
    step(one, first, 3)
    step(two, second, 3)
    assert torch.equal(one, two)
