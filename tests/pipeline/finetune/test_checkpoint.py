"""Checkpoints: whole or absent, rotated, refused for another configuration, and complete for the optimizer."""

from __future__ import annotations

import pytest
import torch
from fake_cuda import fake_cuda
from safetensors.torch import load_file

from fp8pipe.core.errors import BadArtifactError, ConfigurationError
from fp8pipe.numerics.grids import same_bits
from pipeline.finetune import checkpoint
from pipeline.finetune.checkpoint import CheckpointStore, optimizer_tensors, restore_optimizer


def test_only_the_newest_are_kept(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    for step in (10, 20, 30):
        store.save(step, {"b": torch.full((2,), float(step))}, {"history": []})
    assert store.steps() == [20, 30]
    tensors, state = store.load(30)
    assert tensors["b"].tolist() == [30.0, 30.0]
    assert state["step"] == 30


def test_a_step_that_is_saved_again_replaces_its_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for value in (1.0, 2.0):
        store.save(10, {"b": torch.full((2,), value)}, {})
    assert store.load(10)[0]["b"].tolist() == [2.0, 2.0]


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


def test_much_is_written_in_several_files_and_read_whole_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_SHARD_BYTES", 96)
    store = CheckpointStore(tmp_path, keep=2)
    tensors = {name: torch.full((12,), float(place)) for place, name in enumerate("abcde")}  # 48 bytes each
    folder = store.save(10, tensors, {})
    found = store.load(10)[0]
    assert found.keys() == tensors.keys()
    assert all(same_bits(found[name], tensors[name]) for name in tensors)
    parts = sorted(folder.glob("*-of-0003.safetensors"))
    assert [sorted(load_file(part)) for part in parts] == [["a", "b"], ["c", "d"], ["e"]]
    (folder / "state-0002-of-0003.safetensors").unlink()
    with pytest.raises(BadArtifactError, match="step-00000010"):
        store.load(10)


def test_resuming_with_another_configuration_names_the_fields(tmp_path):
    store = CheckpointStore(tmp_path / "c", keep=2)
    store.begin({"rank": 8, "seed": 0})
    assert store.started()
    store.check_config({"rank": 8, "seed": 0})
    with pytest.raises(ConfigurationError, match="another configuration") as error:
        store.check_config({"rank": 16, "seed": 0, "rows": 4})
    assert "rank: 8 then, 16 now" in error.value.why
    assert "rows: None then, 4 now" in error.value.why
    assert "seed" not in error.value.why


def test_resuming_with_another_input_names_the_file(tmp_path):
    store = CheckpointStore(tmp_path / "c", keep=2)
    store.begin({"rank": 8}, {"data.jsonl": "aa"})
    store.check_config({"rank": 8}, {"data.jsonl": "aa"})
    for now in ({"data.jsonl": "bb"}, {}):
        with pytest.raises(ConfigurationError, match=r"data\.jsonl changed") as error:
            store.check_config({"rank": 8}, now)
        assert "sha256 aa then" in error.value.why


# bitsandbytes keeps tensors under 4096 values in fp32, and shares the tables of all that it keeps in 8 bits.
SHAPES = ((96, 64), (64, 80), (8, 8), (128, 64))


def fresh(build, device="cpu"):
    """Named parameters, and an optimizer over them in another order than the names'."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).to(device) for shape in SHAPES]
    parameters = {f"layers.{10 - i}.b": torch.nn.Parameter(value) for i, value in enumerate(values)}
    if build == "adamw":
        return parameters, torch.optim.AdamW(parameters.values(), lr=0.1, fused=True)
    bitsandbytes = pytest.importorskip("bitsandbytes")
    return parameters, bitsandbytes.optim.AdamW8bit(parameters.values(), lr=0.1)


def take_step(parameters, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
    optimizer.step()


def names_of(parameters):
    return {parameter: name for name, parameter in parameters.items()}


@pytest.mark.parametrize("build", ["adamw", "adamw-8bit"])
def test_steps_after_a_restored_checkpoint_are_those_of_a_run_left_alone(tmp_path, build):
    one, first = fresh(build)
    for seed in range(3):
        take_step(one, first, seed)
    store = CheckpointStore(tmp_path, keep=1)
    state = optimizer_tensors(first, names_of(one))
    store.save(3, {name: p.detach() for name, p in one.items()} | state, {})
    two, second = fresh(build)
    tensors, _ = store.load(3)
    assert all(same_bits(tensors[name], value) for name, value in state.items())
    for name, parameter in two.items():
        parameter.data.copy_(tensors[name])
    restore_optimizer(second, names_of(two), tensors)
    for seed in range(3, 6):
        take_step(one, first, seed)
        take_step(two, second, seed)
    assert all(same_bits(one[name].detach(), two[name].detach()) for name in one)


def test_fused_adamw_steps_on_cuda_after_its_state_came_from_a_file():
    """Fused AdamW keeps its count of steps beside the parameter, and a file gives it back on the CPU."""
    with fake_cuda():
        one, first = fresh("adamw", "cuda")
        take_step(one, first, 0)
        loaded = {
            name: torch.zeros_like(t, device="cpu") for name, t in optimizer_tensors(first, names_of(one)).items()
        }
        two, second = fresh("adamw", "cuda")
        restore_optimizer(second, names_of(two), loaded)
        for parameter in two.values():
            assert {key: t.device.type for key, t in second.state[parameter].items()} == dict.fromkeys(
                ("step", "exp_avg", "exp_avg_sq"), "cuda"
            )
        take_step(two, second, 1)


def test_tensors_that_share_memory_are_written_and_read_back(tmp_path):
    whole = torch.arange(12.0)
    tensors = {"a": whole, "b": whole, "rows": whole[4:8], "columns": whole.view(3, 4)[:, 1:3], "none": whole[:0]}
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, tensors, {})
    found, _ = store.load(1)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
