"""`kill -9` at any moment: the run ends in the same contents, and nothing of the killed one lives on."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from breadth import usual
from workflow_runner import Runner

from fp8pipe.core.errors import InterruptedRunError

INTERRUPTED = 5
STAGES = {
    "base": {"command": "work", "value": 1, "steps": 6, "seconds": 0.05},
    "left": {"command": "work", "value": 2, "steps": 4, "seconds": 0.05, "reads": "stage:base"},
    "right": {"command": "work", "value": 3, "reads": "stage:left"},
    "proof": {"command": "record", "reads": "stage:right"},
}


def contents(record):
    return {stage.name: stage.content for stage in record.stages}


def run_in_a_process(directory: Path, stages: dict) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=lambda: Runner(directory).run(stages))
    process.start()
    return process


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_one_left_alone(tmp_path):
    whole = Runner(tmp_path / "whole")
    started = time.monotonic()
    expected = contents(whole.run(STAGES))
    length = time.monotonic() - started
    moments = random.Random(0)
    for attempt in range(usual(6, long=20)):
        runner = Runner(tmp_path / f"cut-{attempt}")
        process = run_in_a_process(runner.directory, STAGES)
        time.sleep(moments.uniform(0.05, length))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert contents(runner.run(STAGES)) == expected, f"killed in attempt {attempt}"
        assert runner.run(STAGES).verdict == "ACCEPT"
        assert runner.started == []


def test_a_killed_stage_goes_on_from_its_checkpoint(tmp_path):
    runner = Runner(tmp_path / "run")
    stages = {"base": STAGES["base"] | {"steps": 8, "seconds": 0.2}}
    process = run_in_a_process(runner.directory, stages)
    place = runner.directory / "base.partial" / "checkpoints" / "step-0002"
    deadline = time.monotonic() + 120
    while not place.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    record = runner.run(stages)
    assert ("base", "work: unfinished") in runner.lines
    from fp8pipe.artifact import open_artifact

    assert open_artifact(runner.directory / record.stages[0].output).manifest.details.resumed >= 3


def test_other_settings_do_not_continue_an_unfinished_stage(tmp_path):
    runner = Runner(tmp_path / "run")
    stages = {"base": STAGES["base"] | {"steps": 8, "seconds": 0.2}}
    process = run_in_a_process(runner.directory, stages)
    place = runner.directory / "base.partial" / "checkpoints" / "step-0001"
    while not place.exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    runner.run({"base": STAGES["base"] | {"value": 7}})
    alone = Runner(tmp_path / "alone")
    assert contents(runner.run({"base": STAGES["base"] | {"value": 7}})) == contents(
        alone.run({"base": STAGES["base"] | {"value": 7}})
    )


def test_an_output_whose_record_was_lost_is_kept(tmp_path):
    """The run may die between the end of a stage and its own record of it."""
    runner = Runner(tmp_path / "run")
    record = runner.run(STAGES)
    for name in ("run.json", "run.sha256"):
        (runner.directory / name).unlink()
    (runner.directory / "stages" / "base.key").write_text(record.stage("base").key)
    os.utime(runner.directory / "stages" / "base.key", (1, 1))
    again = runner.run(STAGES)
    assert "base" not in runner.started
    assert contents(again) == contents(record)


def test_an_engine_of_a_killed_run_does_not_live_on(tmp_path):
    runner = Runner(tmp_path / "run")
    name = f"orphan-of-{os.getpid()}"
    process = run_in_a_process(runner.directory, {"base": STAGES["base"] | {"steps": 200, "orphan": name}})
    deadline = time.monotonic() + 120
    while not alive(name) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive(name)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    deadline = time.monotonic() + 120
    while alive(name) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(name)


def test_an_engine_that_a_stage_leaves_behind_ends_with_it(tmp_path):
    name = f"left-by-{os.getpid()}"
    Runner(tmp_path / "run").run({"base": STAGES["base"] | {"orphan": name}})
    assert not alive(name)


def test_ctrl_c_ends_the_stage_and_can_be_continued(tmp_path):
    stages = {"base": STAGES["base"] | {"steps": 16, "seconds": 0.25}}

    def interrupted() -> None:
        # A shell that runs tests in the background has it ignored, and children inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            Runner(tmp_path / "run").run(stages)
        except InterruptedRunError as error:
            sys.exit(INTERRUPTED if "while running base" in str(error) else 1)

    # A process of its own: a signal that comes late would end the process that runs the tests.
    process = multiprocessing.get_context("fork").Process(target=interrupted)
    process.start()
    place = tmp_path / "run" / "base.partial" / "checkpoints" / "step-0002"
    deadline = time.monotonic() + 120
    while not place.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == INTERRUPTED
    runner = Runner(tmp_path / "run")
    assert runner.run(stages).verdict == "ACCEPT"
    assert ("base", "work: unfinished") in runner.lines


def alive(name: str) -> bool:
    """Whether a process with this word in its command line runs."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if name.encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                    return (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            except OSError:
                continue
    return False
