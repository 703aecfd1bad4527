"""A recipe on a real Ray cluster: the digests and the resumption of a run on this machine, and clear errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import quick_run
import workflow_stage
import yaml
from breadth import only_long
from ray_cluster import ROOT, ray_cluster
from workflow_runner import Runner

from fp8pipe.artifact import open_artifact
from fp8pipe.artifact.runs import read_run
from fp8pipe.core.errors import BadArtifactError, Fp8PipeError, MissingCapabilityError
from fp8pipe.core.version import __version__
from pipeline.workflow.ray_job import Outcome, StageJob
from pipeline.workflow.ray_run import RayRunner, _last_line, _shown, needs_of
from pipeline.workflow.recipe import recipe_of

STAGES = {
    "base": {"command": "work", "value": 1, "steps": 2},
    "left": {"command": "work", "value": 2, "reads": "stage:base"},
    "right": {"command": "work", "value": 3, "reads": "stage:base"},
    "proof": {"command": "record", "reads": "stage:left"},
}
SLOW = {"command": "work", "value": 7, "steps": 30, "seconds": 0.2}


@pytest.fixture(scope="module")
def cluster():
    pytest.importorskip("ray")
    with ray_cluster(cpus=2) as address:
        yield address


def start(folder: Path, stages: dict, cluster: str, *more: str) -> subprocess.Popen[str]:
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"name": "test", "stages": stages}, sort_keys=False))
    command = [sys.executable, "-P", quick_run.__file__, "run", "recipe.yaml", "--output", "run", "--no-report"]
    return subprocess.Popen(
        [*command, "--ray", cluster, *more], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "token"},
    )  # fmt: skip


def run(folder: Path, stages: dict, cluster: str, *more: str) -> tuple[int, str, str]:
    process = start(folder, stages, cluster, *more)
    answer, errors = process.communicate(timeout=120)
    return process.returncode, answer, errors


def keys(record):
    return {stage.name: (stage.key, stage.content, stage.verdict) for stage in record.stages}


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert path.exists()


def stage_of(folder: Path) -> int | None:
    """The id of the process of the stage that runs in a working directory."""
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if words[2:3] == [workflow_stage.__file__.encode()] and (entry / "cwd").readlink() == folder:
                return int(entry.name)
        except OSError:
            continue
    return None


def worker_of(process: int | None) -> int:
    """The id of Ray's process among the ancestors of a process."""
    assert process is not None
    while not (Path("/proc") / str(process) / "cmdline").read_bytes().startswith(b"ray::"):
        process = int((Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[1])
        assert process > 1
    return process


def test_the_run_is_that_of_this_machine(tmp_path, cluster):
    here = Runner(tmp_path / "here")
    expected = keys(here.run(STAGES))
    code, answer, errors = run(tmp_path, STAGES, cluster, "--jobs", "2", "--json")
    assert code == 0, errors
    assert json.loads(answer)["verdict"] == "ACCEPT"
    assert keys(read_run(tmp_path / "run")) == expected
    assert "[left] submitted to Ray: 1 CPUs, 0 GPUs" in errors
    assert "OMP_NUM_THREADS=1" in (tmp_path / "run" / "logs" / "base.log").read_text()
    there = Runner(tmp_path / "run")
    there.run(STAGES)
    assert there.started == []  # the same keys


def test_a_failing_stage_gives_its_own_error_and_ends_the_run(tmp_path, cluster):
    code, answer, errors = run(tmp_path, STAGES | {"left": STAGES["left"] | {"exit_code": 10}}, cluster)
    assert code == 10
    assert "error: the stage left failed: refused" in errors
    assert [stage.name for stage in read_run(tmp_path / "run").stages] == ["base", "left"]
    gate = [{"name": "score", "figure": "details.score", "at_most": 0.5, "reason": "so"}]
    code, answer, errors = run(tmp_path, STAGES | {"left": STAGES["left"] | {"gates": gate}}, cluster, "--json")
    assert code == 14
    assert json.loads(answer)["verdict"] == "REGRESSION"
    assert [stage["name"] for stage in json.loads(answer)["run"]["stages"]] == ["base", "left"]


@only_long  # 20 s of waiting for three runs to reach the moment at which each of them is ended
def test_what_was_interrupted_killed_or_lost_continues(tmp_path, cluster):
    checkpoints = tmp_path / "run" / "base.partial" / "checkpoints"
    process = start(tmp_path, {"base": SLOW}, cluster)
    wait_for(checkpoints / "step-0002")
    process.send_signal(signal.SIGTERM)  # taken as Ctrl-C, which processes in the background of a shell ignore
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "while running base" in errors
    assert stage_of(tmp_path) is None
    done = len(list(checkpoints.glob("step-*")))

    process = start(tmp_path, {"base": SLOW}, cluster)
    wait_for(checkpoints / f"step-{done + 1:04d}")
    stage = stage_of(tmp_path)
    assert stage is not None
    os.kill(stage, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 137, errors
    assert "the process of the stage base died" in errors
    done = len(list(checkpoints.glob("step-*")))

    process = start(tmp_path, {"base": SLOW}, cluster)
    wait_for(checkpoints / f"step-{done + 1:04d}")
    os.kill(worker_of(stage_of(tmp_path)), signal.SIGKILL)  # as if its node was lost
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "[base] its process or node was lost, and it is started again" in errors
    assert open_artifact(tmp_path / "run" / "base").manifest.details.resumed > done
    alone = Runner(tmp_path / "alone").run({"base": SLOW | {"seconds": 0.0}})
    assert read_run(tmp_path / "run").stages[0].content == alone.stages[0].content


def test_a_cluster_without_room_is_refused(tmp_path, cluster):
    greedy = {"base": STAGES["base"] | {"resources": {"gpus": 2}}}
    code, _, errors = run(tmp_path, greedy, cluster)
    assert code == 11
    assert "no node of the Ray cluster" in errors
    assert "it needs 1 CPUs, 2 GPUs; the nodes offer 2 CPUs, 0 GPUs" in errors


def job(place: Path, **changed) -> StageJob:
    values = {"folder": str(place), "shared": str(place / "shared"), "version": __version__, "gpus": 0}
    return StageJob("base", (), **(values | changed))


def test_a_node_with_another_fp8pipe_or_directory_is_refused(tmp_path):
    for other in ({}, {"folder": str(tmp_path / "none")}):
        with pytest.raises(MissingCapabilityError, match="does not share the directory of the run"):
            job(tmp_path, **other).check()
        (tmp_path / "shared").touch()
    job(tmp_path).check()
    with pytest.raises(MissingCapabilityError, match="has fp8pipe"):
        job(tmp_path, version="0.0.0").check()


def test_the_environment_of_a_stage_is_not_ray_s(tmp_path):
    worker = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "3", "HOME": "/x"}
    assert job(tmp_path, gpus=1).environment(worker) == {"CUDA_VISIBLE_DEVICES": "3", "HOME": "/x"}
    assert job(tmp_path, threads="4").environment(worker) == {
        "CUDA_VISIBLE_DEVICES": "", "HOME": "/x", "OMP_NUM_THREADS": "4",
    }  # fmt: skip


def judging(tmp_path) -> tuple[RayRunner, list[str]]:
    said: list[str] = []
    state = Runner(tmp_path / "run").state(STAGES)
    return RayRunner(state, lambda stage, line: said.append(line), "auto"), said


def test_a_job_that_succeeds_without_a_document_is_an_error_that_says_so(tmp_path):
    with pytest.raises(BadArtifactError, match="the job of the stage base says nothing of its result"):
        judging(tmp_path)[0]._judged("base", Outcome(0, {}))
    with pytest.raises(Fp8PipeError, match="ended with exit code 7") as found:
        judging(tmp_path)[0]._judged("base", Outcome(7, {}))
    assert found.value.exit_code == 1


def test_a_stage_has_the_verdict_and_the_error_of_its_own_job(tmp_path):
    runner, said = judging(tmp_path)
    stages = [{"name": "base", "verdict": "ACCEPT"}, {"name": "left", "verdict": "REGRESSION"}]
    document = {"verdict": "REGRESSION", "run": {"stages": stages}}  # of the whole run, whose stages are all judged
    assert runner._judged("base", Outcome(0, document))
    assert not runner._failed
    assert not runner._judged("left", Outcome(14, document))
    assert runner._failed
    assert said == ["ACCEPT", "REGRESSION"]
    error = {"what": "no layer", "why": "so", "fix": "do", "exit_code": 12}
    with pytest.raises(Fp8PipeError) as found:
        runner._judged("left", Outcome(12, {"error": error}))
    assert error == {key: getattr(found.value, key) for key in error}


def test_a_stage_that_its_node_interrupts_is_started_again_but_not_for_ever(tmp_path, monkeypatch):
    """With a stand-in for Ray that gives the outcome, as no test can shut a node down."""
    exceptions = pytest.importorskip("ray").exceptions
    runner, said = judging(tmp_path)
    submitted: list[str] = []
    monkeypatch.setattr(runner, "_ray", SimpleNamespace(exceptions=exceptions, get=lambda reference: Outcome(130)))
    monkeypatch.setattr(runner, "_submit", submitted.append)
    assert [runner._ended("base", None) for _ in range(2)] == [False, False]
    assert submitted == ["base", "base"]
    assert "interrupted on its node" in said[0]
    with pytest.raises(MissingCapabilityError, match="was lost 3 times"):
        runner._ended("base", None)


def test_an_error_without_a_message_is_shown_by_its_class():
    assert (_shown(ValueError()), _last_line(ValueError())) == ("ValueError", "ValueError")
    assert _last_line(ValueError("a\nb\n")) == "b"


@pytest.mark.parametrize(
    ("stage", "nodes", "needs"),
    [
        ({}, [{"CPU": 8.0}], {"CPU": 1, "GPU": 0}),
        ({}, [{"CPU": 8.0}, {"CPU": 8.0, "GPU": 4.0}], {"CPU": 1, "GPU": 1}),
        ({"device": "cpu"}, [{"CPU": 8.0, "GPU": 4.0}], {"CPU": 1, "GPU": 0}),
        ({"device": "cuda"}, [{"CPU": 8.0}], {"CPU": 1, "GPU": 1}),
        ({"resources": {"gpus": 0}}, [{"CPU": 8.0, "GPU": 4.0}], {"CPU": 1, "GPU": 0}),
        ({"resources": {"cpus": 4, "gpus": 2, "memory": "1GiB"}}, [], {"CPU": 4, "GPU": 2, "memory": 2**30}),
    ],
)
def test_what_a_stage_needs(stage, nodes, needs):
    spec = recipe_of({"stages": {"a": {"command": "work", **stage}}}, "here").stages[0]
    assert needs_of(spec, [{"Resources": node} for node in nodes]) == needs
