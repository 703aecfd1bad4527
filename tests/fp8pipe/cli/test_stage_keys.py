"""The key of a stage names the device that it would compute on: `auto` counts as what it takes, a CPU goes unsaid."""

from __future__ import annotations

import pytest

from fp8pipe.cli.stages import stage_commands
from fp8pipe.core import machine
from fp8pipe.core.machine import Gpu
from pipeline.workflow import RunOptions, RunState, load_recipe
from pipeline.workflow.keys import stage_key

STAGES = {
    "finetune": "model: m\n    data: d", "quantize-vit": "model: m\n    bits: w4a4", "validate": "export: e",
    "bench": "export: e",
}  # fmt: skip


@pytest.fixture
def key(tmp_path):
    def of(command: str, device: str | None = None) -> str:
        line = "" if device is None else f"\n    device: {device}"
        file = tmp_path / "recipe.yaml"
        file.write_text(f"stages:\n  one:\n    command: {command}\n    {STAGES[command]}{line}\n")
        recipe = load_recipe(file, ())
        state = RunState(recipe, stage_commands(), tmp_path / "run", RunOptions())
        found = state.key(recipe.stages[0])
        if device is None and not machine.gpus():  # as before there was a device to name
            engine = {f"engine {n}": v for n, v in state.commands[command].versions(recipe.stages[0].settings).items()}
            own = {name: version for name, version in state.versions.items() if name != "python"}
            sources = {name: str(value) for name, value in recipe.stages[0].settings.items()
                       if name in state.commands[command].sources}  # fmt: skip
            assert found == stage_key(recipe.stages[0], {}, sources, own | engine)
        return found

    return of


@pytest.mark.parametrize("command", STAGES)
def test_auto_has_the_key_of_what_it_takes(command, key, monkeypatch):
    monkeypatch.setattr(machine, "gpus", lambda: [])
    assert key(command) == key(command, "auto") == key(command, "cpu")
    on_cpu, on_gpu = key(command, "cpu"), key(command, "cuda")
    assert on_cpu != on_gpu
    monkeypatch.setattr(machine, "gpus", lambda: [Gpu("H200", (9, 0), 141 << 30)])
    assert key(command) == key(command, "auto") == on_gpu
    assert key(command, "cpu") == on_cpu


def test_a_gpu_that_cannot_do_the_work_changes_no_key(key, monkeypatch):
    monkeypatch.setattr(machine, "gpus", lambda: [])
    before = key("finetune")
    monkeypatch.setattr(machine, "gpus", lambda: [Gpu("V100", (7, 0), 16 << 30)])
    assert key("finetune") == before
    monkeypatch.setattr(machine, "gpus", lambda: [Gpu("A100", (8, 0), 40 << 30)])
    assert key("quantize-vit") == key("quantize-vit", "cuda")


def test_trackers_are_no_part_of_a_key(tmp_path):
    def key(line: str) -> str:
        file = tmp_path / "recipe.yaml"
        file.write_text(f"stages:\n  one:\n    command: finetune\n    {STAGES['finetune']}\n    {line}\n")
        recipe = load_recipe(file, ())
        return RunState(recipe, stage_commands(), tmp_path / "run", RunOptions()).key(recipe.stages[0])

    assert key("report_to: [mlflow, wandb]") == key("") != key("steps: 7")


def test_what_an_evaluation_is_compared_with_is_part_of_its_key(tmp_path):
    def key(against: str) -> str:
        file = tmp_path / "recipe.yaml"
        file.write_text(
            "stages:\n  one:\n    command: evaluate\n    export: e\n    tasks: t\n"
            f"    against: [{against}, sample:smollm2]\n"
        )
        recipe = load_recipe(file, ())
        return RunState(recipe, stage_commands(), tmp_path / "run", RunOptions()).key(recipe.stages[0])

    model = tmp_path / "model"
    model.mkdir()
    (model / "weights").write_text("1")
    before = key(str(model))
    assert before == key(str(model))
    (model / "weights").write_text("2")  # in the same place, and named last
    assert key(str(model)) != before
