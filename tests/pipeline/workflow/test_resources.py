"""The resources of a stage: no part of its key, threads, and several processes."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from workflow_runner import Runner

from fp8pipe.cli.stages import stage_commands
from fp8pipe.core.errors import ConfigurationError, Fp8PipeError, MissingCapabilityError
from pipeline.workflow import RunOptions, RunState, WorkflowRunner
from pipeline.workflow.kubernetes import _FINAL_CODES
from pipeline.workflow.recipe import recipe_of
from pipeline.workflow.resources import Resources, launcher

STAGE = {"command": "work", "value": 1}


def test_resources_are_read_given_back_and_no_part_of_the_key(tmp_path):
    resources = {"gpus": 0, "cpus": 2, "memory": "1GiB"}
    recipe = recipe_of({"stages": {"a": STAGE | {"resources": resources}}}, "here")
    assert recipe.stages[0].resources == Resources(gpus=0, cpus=2, memory=2**30)
    assert recipe_of(recipe.plain(), "again") == recipe
    runner = Runner(tmp_path / "run")
    runner.run({"a": STAGE})
    runner.run({"a": STAGE | {"resources": resources}})
    assert runner.started == []


@pytest.mark.parametrize(
    ("resources", "words"),
    [({"gpu": 1}, "gpu: unknown key, did you mean 'gpus'"), ({"cpus": 0}, "cpus: "), ({"memory": "much"}, "memory: ")],
)
def test_wrong_resources_are_named(resources, words):
    with pytest.raises(ConfigurationError, match="stage a of here: the resources settings") as found:
        recipe_of({"stages": {"a": STAGE | {"resources": resources}}}, "here")
    assert words in found.value.why
    with pytest.raises(ConfigurationError, match="resources is no mapping"):
        recipe_of({"stages": {"a": STAGE | {"resources": [resources]}}}, "here")


def test_threads_are_those_of_the_recipe_unless_the_user_sets_them(runner, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    stages = {"a": STAGE | {"resources": {"cpus": 3}}}
    runner.run(stages)
    assert ("a", "OMP_NUM_THREADS=3") in runner.lines
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    runner.run(stages, force=("a",))
    assert ("a", "OMP_NUM_THREADS=5") in runner.lines


def test_several_gpus_are_several_processes_of_which_one_reports(runner, monkeypatch):
    """With a failed gate: torchrun exits with 1 then, but the stage has said that its artifact is complete."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    record = runner.run({"a": STAGE | {"gate": 3, "resources": {"gpus": 2, "cpus": 4}}})
    assert [stage.error for stage in record.stages] == [None]
    assert record.stages[0].gates[0].value == 3
    assert record.stages[0].reproduce.startswith("torchrun --nproc-per-node 2 -m fp8pipe work ")
    for rank in (0, 1):
        assert any(line.startswith(f"OMP_NUM_THREADS=2 RANK={rank}") for _, line in runner.lines)


def test_without_cpus_several_processes_share_all_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    assert Resources(gpus=4).environment(4)["OMP_NUM_THREADS"] == "3"
    assert Resources(gpus=1).environment(1) == {}


def test_several_processes_of_which_one_was_killed_end_like_one_that_was(runner):
    """torchrun exits with 1 then, after which a Kubernetes Job would not be tried again."""
    with pytest.raises(Fp8PipeError, match="the process of the stage a died") as found:
        runner.run({"a": STAGE | {"killed": True, "resources": {"gpus": 2}}})
    assert found.value.exit_code == 137 not in _FINAL_CODES


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, "gradient_accumulation is 1"),
        ({"gradient_accumulation": 4, "device": "cpu"}, "device is cpu, and resources.gpus is 4"),
    ],
)
def test_resources_that_the_settings_cannot_use_are_refused_before_anything_runs(tmp_path, settings, said):
    stage = {"command": "finetune", "model": "sample:smollm2", "data": "sample:chatterbot", "resources": {"gpus": 4}}
    recipe = recipe_of({"stages": {"a": stage | settings}}, "here")
    runner = WorkflowRunner(RunState(recipe, stage_commands(), tmp_path / "run", RunOptions()), print)
    with pytest.raises(ConfigurationError) as found:
        runner.check(recipe.stages)
    assert said in found.value.why


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_several_gpus_on_a_machine_without_are_no_processes_on_the_cpu(tmp_path):
    stage = {"command": "quantize-vit", "model": "sample:vit-digits", "bits": "w8a8", "resources": {"gpus": 2}}
    recipe = recipe_of({"stages": {"a": stage}}, "here")
    runner = WorkflowRunner(RunState(recipe, stage_commands(), tmp_path / "run", RunOptions()), print)
    runner.check(recipe.stages)  # as the nodes of a cluster may have them
    with pytest.raises(MissingCapabilityError, match="the stage a asks for 2 GPUs"):
        runner.run()


def test_one_process_needs_no_launcher():
    program = (sys.executable, "-P", "-m", "fp8pipe")
    assert launcher(program, 1) == list(program)
