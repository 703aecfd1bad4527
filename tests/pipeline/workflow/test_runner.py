"""Running a recipe of quick stages: what runs, what does not run again, what stops it, and what the record says."""

from __future__ import annotations

import copy
import itertools
import json
import os
import shutil

import pytest
import workflow_runner

from fp8pipe.artifact import open_artifact
from fp8pipe.artifact.gate import Comparison, Verdict
from fp8pipe.artifact.runs import read_run
from fp8pipe.core.errors import ConfigurationError, Fp8PipeError
from pipeline.workflow import locks
from pipeline.workflow import runner as workflow

STAGES = {
    "base": {"command": "work", "value": 1, "steps": 2},
    "left": {"command": "work", "value": 2, "reads": "stage:base"},
    "right": {"command": "work", "value": 3, "reads": "stage:base"},
    "proof": {"command": "record", "reads": "stage:left"},
}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The directory of a finished run; not to be changed."""
    runner = workflow_runner.Runner(tmp_path_factory.mktemp("whole") / "run")
    assert runner.run(STAGES).verdict is Verdict.ACCEPT
    return runner.directory


@pytest.fixture
def finished(whole_run, runner):
    """A runner whose run of STAGES has ended: a directory of a run may be moved."""
    shutil.copytree(whole_run, runner.directory)
    return runner


def changed(**stages):
    """STAGES with some settings changed."""
    found = copy.deepcopy(STAGES)
    for name, settings in stages.items():
        found[name].update(settings)
    return found


def test_everything_runs_once_and_then_nothing(runner, monkeypatch):
    readings = itertools.count(1000)  # of a clock that never gives the same time twice
    monkeypatch.setattr(workflow, "_now", lambda: str(next(readings)))
    record = runner.run(STAGES)
    assert runner.started == ["base", "left", "right", "proof"]
    assert record.verdict is Verdict.ACCEPT
    assert record.started < min(stage.started for stage in record.stages)
    again = runner.run(STAGES)
    assert runner.started == []
    assert again.started == record.started
    assert [stage.content for stage in again.stages] == [stage.content for stage in record.stages]
    assert read_run(runner.directory) == again
    assert all(stage.seconds > 0 and stage.peak_rss_bytes > 1e6 for stage in record.stages)
    assert "working on" in (runner.directory / record.stages[0].log).read_text()


@pytest.mark.parametrize(
    ("change", "started"),
    [
        ({"base": {"value": 9}}, ["base", "left", "right", "proof"]),
        ({"left": {"value": 9}}, ["left", "proof"]),
        ({"right": {"value": 9}}, ["right"]),
        # More steps that end in the same bytes: nothing is built anew, and a record of another manifest is made again.
        ({"base": {"seconds": 0.01}}, ["base"]),
        ({"left": {"seconds": 0.01}}, ["left", "proof"]),
        ({"proof": {"value": 5}}, ["proof"]),
    ],
)
def test_a_changed_key_runs_exactly_what_depends_on_it(finished, change, started):
    finished.run(changed(**change))
    assert finished.started == started


def test_what_has_changed_is_named(finished):
    stages = changed(base={"value": 9, "steps": 2}, right={"seconds": 0.01})
    why = {status.spec.name: status.why for status in finished.state(stages).statuses()}
    assert why["base"] == "changed: value 1 -> 9"
    assert why["right"] == "after base"
    why = {status.spec.name: status.why for status in finished.state(changed(right={"seconds": 0.01})).statuses()}
    assert why == {
        "base": "up to date", "left": "up to date", "right": "changed: seconds (none) -> 0.01", "proof": "up to date",
    }  # fmt: skip


@pytest.mark.parametrize("place", ["version", "package", "engine"])
def test_other_versions_run_what_they_decide(runner, monkeypatch, place):
    before = {stage.name: stage.key for stage in runner.run(STAGES).stages}
    if place == "version":
        monkeypatch.setattr("pipeline.workflow.keys.__version__", "9.9.9")
        monkeypatch.setattr("pipeline.workflow.state.__version__", "9.9.9")
    elif place == "package":
        monkeypatch.setattr("pipeline.workflow.state.installed_versions", lambda names: {"torch": "9.9.9"})
    else:
        monkeypatch.setitem(workflow_runner.ENGINE, "vllm", "9.9.9")
    statuses = runner.state(STAGES).statuses()
    stale = {status.spec.name for status in statuses if status.run}
    assert stale == ({"proof"} if place == "engine" else set(STAGES))
    assert all(status.key != before[status.spec.name] for status in statuses if status.run)
    if place != "engine":
        assert "9.9.9" in statuses[0].why


def test_a_source_is_known_by_its_bytes(runner, tmp_path):
    source = tmp_path / "text.txt"
    source.write_text("one")
    stages = changed(base={"source": str(source)})
    runner.run(stages)
    os.utime(source, (1, 1))  # touched, not changed
    runner.run(stages)
    assert runner.started == []
    source.write_text("two")
    why = runner.state(stages).statuses()[0].why
    assert why == "settings, inputs, the device or the engine's versions have changed"  # no setting has
    runner.run(stages)
    assert runner.started == ["base"]  # which writes what it wrote before


def test_an_output_that_was_changed_is_made_again(finished):
    (finished.directory / "left" / "weights.txt").write_text("other")
    finished.run(STAGES)
    assert finished.started == ["left", "proof"]  # its record speaks of the manifest that is no more
    shutil.rmtree(finished.directory / "base")
    finished.run(STAGES)
    assert finished.started == ["base"]


def test_copied_output_with_other_times_is_hashed_and_kept(finished):
    for path in (finished.directory / "base").iterdir():
        os.utime(path, (1, 1))
    finished.run(STAGES)
    assert finished.started == []


def test_until_runs_it_and_what_it_needs(runner):
    runner.run(STAGES, last="proof")
    assert runner.started == ["base", "left", "proof"]
    runner.run(STAGES)
    assert runner.started == ["right"]


def test_from_takes_what_is_before_as_it_is(runner):
    with pytest.raises(ConfigurationError, match="no output that can be reused"):
        runner.run(STAGES, first="left")
    runner.run(STAGES)
    runner.run(changed(base={"value": 8}, left={"value": 8}), first="left")
    assert runner.started == ["left", "proof"]


def test_force_runs_a_stage_that_is_up_to_date(finished):
    finished.run(STAGES, force=("right",))
    assert finished.started == ["right"]


def test_a_wrong_stage_name_is_refused(runner):
    with pytest.raises(ConfigurationError, match="no stage named 'lfet'"):
        runner.state(STAGES, last="lfet")


def test_every_mistake_is_named_before_anything_runs(runner):
    with pytest.raises(ConfigurationError) as found:
        runner.run(changed(base={"vlaue": 1}, right={"stpes": 1}))
    assert "base: vlaue" in found.value.why
    assert "right: stpes" in found.value.why
    assert runner.started == []


def test_unknown_commands_and_foreign_directories_are_refused(runner):
    with pytest.raises(ConfigurationError, match="unknown commands: a: train"):
        runner.state({"a": {"command": "train"}})
    runner.directory.mkdir()
    (runner.directory / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="is not a run"):
        runner.state(STAGES)


def test_two_stages_cannot_write_one_record(runner):
    stages = STAGES | {"again": {"command": "record", "reads": "stage:left", "value": 2}}
    with pytest.raises(ConfigurationError, match="proof and again would write the same file"):
        runner.state(stages)


@pytest.mark.parametrize(
    ("gate", "verdict"),
    [
        ({"figure": "details.score", "at_most": 2}, Verdict.ACCEPT),
        ({"figure": "details.score", "at_most": 1}, Verdict.REGRESSION),
        ({"figure": "details.score", "at_least": 1.5, "at_most": 1.5}, Verdict.ACCEPT),
        ({"figure": "details.socre", "at_most": 2}, Verdict.ANOMALOUS),
        ({"figure": "details.score", "minus": "right#details.score", "at_least": 0.4}, Verdict.ACCEPT),
        ({"figure": "details.score", "over": "right#details.score", "at_most": 1.4}, Verdict.REGRESSION),
        ({"figure": "details.score", "minus": "right#details.socre", "at_most": 9}, Verdict.ANOMALOUS),
    ],
)
def test_gates_of_the_recipe(runner, gate, verdict):
    stages = changed(left={"score": 1.5, "after": ["right"], "gates": [{"name": "score", "reason": "so", **gate}]})
    record = runner.run(stages)
    assert record.verdict is verdict
    outcome = record.stage("left").gates[-1]
    assert outcome.verdict is verdict
    assert outcome.source.startswith("left/manifest.json#details.")
    assert ("proof" in runner.started) is (verdict is Verdict.ACCEPT)  # nothing is built on what is not accepted


def test_a_changed_threshold_judges_again_and_runs_nothing(runner):
    gate = {"name": "score", "figure": "details.score", "reason": "so"}
    stages = changed(left={"gates": [gate | {"at_most": 2}]})
    runner.run(stages)
    record = runner.run(changed(left={"gates": [gate | {"at_most": 0.5}]}))
    assert runner.started == []
    assert record.verdict is Verdict.REGRESSION


def test_a_score_that_is_no_number_is_anomalous(runner):
    gate = {"name": "score", "figure": "details.score", "at_most": 2, "reason": "so"}
    record = runner.run(changed(left={"score": float("nan"), "gates": [gate]}))
    assert record.verdict is Verdict.ANOMALOUS


def test_gates_that_a_stage_judged_itself_count(runner):
    record = runner.run(changed(left={"gate": 3}))
    outcome = record.stage("left").gates[0]
    assert (outcome.verdict, outcome.value) == (Verdict.ANOMALOUS, 3)
    assert (outcome.comparison, outcome.threshold) == (Comparison.AT_MOST, 1)
    assert outcome.source == "left/manifest.json#gates.0.value"
    assert runner.run(changed(left={"gate": 1})).verdict is Verdict.ACCEPT


def test_a_rejecting_record_is_a_verdict(runner):
    record = runner.run(changed(proof={"verdict": "REJECT"}))
    assert record.verdict is Verdict.ANOMALOUS
    assert "REJECT" in record.stage("proof").gates[-1].name
    runner.run(changed(proof={"verdict": "REJECT"}))
    assert runner.started == ["proof"]  # a stage that failed is tried again


@pytest.mark.parametrize(
    ("writes", "named"),
    [
        ("nothing", "wrote nothing at"),
        ("no JSON", "it is not JSON"),
        ("a list", "it is not JSON: its top level is a list"),
        ("no verdict", "verdict: Field required"),
        ("a byte more", "has sha256"),
        ("no checksum", "has no checksum"),
    ],
)
@pytest.mark.parametrize("verdict", ["ACCEPT", "REJECT"])
def test_a_stage_that_ends_well_without_a_sound_record_is_not_accepted(finished, writes, named, verdict):
    gate = {"name": "speed", "figure": "figures.speed", "at_least": 1, "reason": "so"}
    record = finished.run(changed(proof={"writes": writes, "verdict": verdict, "gates": [gate]}))
    assert record.verdict is Verdict.ANOMALOUS
    proof = record.stage("proof")
    if verdict == "ACCEPT":
        said = [gate.detail for gate in proof.gates] + [str(proof.error)]
        assert any(named in text for text in said)
        speed = [gate.verdict for gate in proof.gates if gate.name == "speed"]
        assert speed == ([] if writes == "nothing" else [Verdict.ANOMALOUS])  # asked, and not dropped
    finished.run(changed(proof={"writes": writes, "verdict": verdict, "gates": [gate]}))
    assert finished.started == ["proof"]


def test_a_stage_that_writes_no_artifact_is_not_judged_by_the_one_that_was_there(finished):
    record = finished.run(changed(left={"writes": "nothing"}))
    assert record.verdict is Verdict.ANOMALOUS
    assert "wrote nothing at" in record.stage("left").error["what"]
    assert finished.started == ["left"]


def test_a_record_that_is_edited_later_is_never_up_to_date(finished):
    path = next(finished.directory.glob("*.record.json"))
    state, whole = path.stat(), path.read_bytes()
    for edited in (whole + b" ", whole.replace(b"ACCEPT", b"REJECT"), b"{" + whole[1:-1] + b"]"):
        path.write_bytes(edited)
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert finished.state(STAGES).status(finished.state(STAGES).recipe.stage("proof")).run


@pytest.mark.parametrize("verdict", ["PROVED-WITHOUT-RUNNING", "CONSISTENT"])
def test_what_is_not_proved_is_neither_accepted_nor_failed(runner, verdict):
    record = runner.run(changed(proof={"verdict": verdict}))
    assert record.verdict == verdict
    assert not record.verdict.failed
    assert record.stage("proof").gates[-1].verdict == verdict


@pytest.mark.parametrize(
    ("code", "verdict"),
    [
        (11, Verdict.INFEASIBLE),
        (13, Verdict.INFEASIBLE),
        (15, Verdict.INFEASIBLE),
        (12, Verdict.ANOMALOUS),
        (14, Verdict.ANOMALOUS),
    ],
)
def test_exit_codes_that_are_verdicts(runner, code, verdict):
    record = runner.run(changed(left={"exit_code": code}))
    assert record.verdict is verdict
    assert record.stage("left").error["what"] == "refused"
    assert record.stage("left").content == ""
    assert "proof" not in runner.started


@pytest.mark.parametrize("code", [1, 10, 130])
def test_other_exit_codes_end_the_run_with_their_own(runner, code):
    with pytest.raises(Fp8PipeError, match="the stage left failed: refused") as found:
        runner.run(changed(left={"exit_code": code}))
    assert found.value.exit_code == code
    assert read_run(runner.directory).stage("left").error["exit_code"] == code
    runner.run(STAGES)
    assert runner.started == ["left", "right", "proof"]


def test_stages_that_need_nothing_of_each_other_run_side_by_side(runner):
    stages = changed(left={"seconds": 1.0}, right={"seconds": 1.0})
    runner.run(stages, jobs=2)
    ended = [(stage, line[:6]) for stage, line in runner.lines if line.startswith(("ACCEPT", "work: "))]
    assert ended.index(("right", "work: ")) < ended.index(("left", "ACCEPT"))


def test_a_second_run_in_the_same_directory_is_refused(runner, monkeypatch):
    monkeypatch.setattr(locks, "_LOCK_S", 0.2)
    monkeypatch.setattr(locks, "_JOB_LOCK_S", 2.0)
    with locks.locked_run(runner.directory), pytest.raises(ConfigurationError, match="is being written by another run"):
        runner.run(STAGES)
    assert [line.partition(": ")[2] for _, line in runner.lines] == [
        "waiting for up to 0 s"
    ]  # a job would wait for longer


def test_the_record_holds_what_is_needed_to_do_it_again(runner):
    record = runner.run(STAGES)
    stage = record.stage("left")
    assert stage.reproduce.startswith("fp8pipe work --config ")
    assert stage.inputs == {"reads": "base"}
    assert record.resolved["stages"]["left"]["reads"] == "stage:base"
    assert json.loads((runner.directory / "run.json").read_text())["machine"]["cores"] >= 1
    parent = open_artifact(runner.directory / "left").manifest.parents[0]
    assert parent.content == record.stage("base").content
