"""Stages that run one by one, as the jobs of a cluster do: the same digests, and no record is lost."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import time

import pytest
from workflow_runner import Runner

from fp8pipe.artifact.runs import read_run
from fp8pipe.core.errors import ConfigurationError, MissingCapabilityError
from pipeline.workflow import locks
from pipeline.workflow.kubernetes import _STOP_S

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
    monkeypatch.setattr(locks, "_JOB_LOCK_S", 0.1)
    # `proof` reads `left`, and `left` reads `base`.
    held_by_left = (({"only": name}, f"the stage {held} in") for name, held in (("left", "left"), ("proof", "left")))
    for options, held in (*held_by_left, ({"only": "base"}, "the stage base in"), ({}, "jobs is being written")):
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


def test_a_job_waits_longer_than_an_ended_pod_or_an_nfs_lease_lasts_and_says_so(tmp_path, monkeypatch):
    assert locks._JOB_LOCK_S > _STOP_S + 90  # an NFS server keeps the locks of a lost node for 90 s by default
    monkeypatch.setattr(locks, "_JOB_LOCK_S", 0.1)
    said: list[str] = []
    with (
        locks.locked_run(tmp_path, shared=True, stage="a"),
        pytest.raises(ConfigurationError, match="the stage a in"),
        locks.locked_run(tmp_path, shared=True, stage="a", tell=said.append),
    ):
        pass
    assert said == [f"the stage a in {tmp_path} is in use by another run: waiting for up to 0 s"]


def test_every_lock_is_on_a_file_that_nfs_lets_lock(tmp_path):
    """NFS emulates flock by locks of byte ranges: shared ones need a file open for reading, others one for writing."""
    with locks.locked_run(tmp_path, shared=True, stage="a", reads=("b",)) as descriptors:
        assert len(descriptors) == 3
        assert {fcntl.fcntl(one, fcntl.F_GETFL) & os.O_ACCMODE for one in descriptors} == {os.O_RDWR}


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuses(*given):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", refuses)  # there is no such file system here
    with pytest.raises(MissingCapabilityError, match="cannot be locked") as found, locks.locked_run(tmp_path):
        pass
    assert "No locks available" in found.value.why


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
