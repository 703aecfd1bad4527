"""Stages that run one by one, as the jobs of a cluster do: the same digests, and no record is lost."""

from __future__ import annotations

import multiprocessing
import time

import pytest
from workflow_runner import Runner

from fp8pipe.artifact.runs import read_run
from fp8pipe.core.errors import ConfigurationError
from pipeline.workflow import locks

STAGES = {
    "base": {"command": "work", "value": 1, "steps": 2},
    "left": {"command": "work", "value": 2, "reads": "stage:base"},
    "right": {"command": "work", "value": 3, "reads": "stage:base"},
    "proof": {"command": "record", "reads": "stage:left"},
}


def keys(record):
    return {stage.name: (stage.key, stage.content) for stage in record.stages}


def start(runner: Runner, stages: dict, name: str) -> multiprocessing.Process:
    """Run a stage in a process of its own; returns when the stage is running."""
    process = multiprocessing.get_context("fork").Process(target=lambda: runner.run(stages, only=name))
    process.start()
    deadline = time.monotonic() + 60
    while not (runner.directory / f"{name}.partial").is_dir() and time.monotonic() < deadline:
        time.sleep(0.01)
    return process


def test_stages_one_by_one_are_a_whole_run_and_two_at_once_lose_no_record(tmp_path, monkeypatch):
    go = tmp_path / "go"
    go.touch()
    stages = STAGES | {"left": STAGES["left"] | {"waits_for": str(go)}}
    runner = Runner(tmp_path / "jobs")
    expected = keys(Runner(tmp_path / "whole").run(stages))
    with pytest.raises(ConfigurationError, match="the stage base has no output that can be reused") as found:
        runner.run(stages, only="left")
    assert found.value.fix == "run base first"
    assert [stage.name for stage in runner.run(stages, only="base").stages] == ["base"]
    go.unlink()
    left = start(runner, stages, "left")
    monkeypatch.setattr(locks, "_LOCK_S", 0.1)
    for options, held in (({"only": "left"}, "the stage left in"), ({}, "jobs is being written")):
        with pytest.raises(ConfigurationError, match=held):
            runner.run(stages, **options)
    assert [stage.name for stage in runner.run(stages, only="right").stages] == ["base", "right"]
    go.touch()  # only now, so that `left` began with a record of the run without `right`
    left.join(60)
    assert [stage.name for stage in read_run(runner.directory).stages] == ["base", "left", "right"]
    runner.run(stages, only="proof")
    assert keys(read_run(runner.directory)) == expected
    runner.run(stages)
    assert runner.started == []


def test_a_stage_alone_is_judged_with_what_it_depends_on_only(runner):
    rejected = STAGES | {"right": STAGES["right"] | {"gate": 3}}
    assert runner.run(rejected).verdict == "ANOMALOUS"
    changed = STAGES | {"left": STAGES["left"] | {"value": 9}}
    record = runner.run(changed, only="left")
    assert (record.verdict, runner.started) == ("ACCEPT", ["left"])
    assert read_run(runner.directory).verdict == "ANOMALOUS"


def test_nothing_is_built_on_what_was_not_accepted(runner):
    rejected = STAGES | {"base": STAGES["base"] | {"gate": 3}}
    runner.run(rejected, only="base")
    record = runner.run(rejected, only="left")
    assert (record.verdict, runner.started) == ("ANOMALOUS", [])
