"""Each line reaches each tracker once, whatever fails or is killed; a tracker that fails ends nothing."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from tuning_config import config

from fp8pipe.core.errors import ConfigurationError, MissingCapabilityError
from pipeline.tracking.config import require_trackers
from pipeline.tracking.reporter import TRACKERS_FILE, Reporter, reporting
from pipeline.tracking.tracker import Subject

LINES = [{"step": step, "loss": 1.0 / (step + 1)} for step in range(6)]


class Board:
    """A tracker in memory, whose server goes away before some line."""

    def __init__(self, run: str = "one", fails_at: int | None = None) -> None:
        self.run, self.place, self.fails_at = run, "here", fails_at
        self.points: list[tuple[int, float]] = []
        self.facts: dict[str, str] = {}
        self.endings: list[str] = []

    def log(self, step, figures):
        if step == self.fails_at:
            raise ConnectionError("the server is gone")
        self.points.append((step, figures["loss"]))

    def tag(self, facts):
        self.facts.update(facts)

    def close(self, ending):
        self.endings.append(ending)


def noted(folder: Path) -> dict:
    file = folder / TRACKERS_FILE
    return json.loads(file.read_text()) if file.exists() else {}


def reporter(folder: Path, **boards: Board) -> Reporter:
    return Reporter(boards, noted(folder), folder / TRACKERS_FILE)


POINTS = [(line["step"], line["loss"]) for line in LINES]


def test_a_resumed_run_reports_no_line_twice_and_a_new_tracker_gets_all(tmp_path):
    board, late = Board(), Board()
    report = reporter(tmp_path, mlflow=board).follow("training", [])
    for line in LINES[:4]:
        report(line)
    again = reporter(tmp_path, mlflow=board, wandb=late)  # the last checkpoint was written after two lines
    report = again.follow("training", LINES[:2])
    for line in LINES[2:]:
        report(line)
    assert board.points == late.points == POINTS


def test_lines_that_come_in_another_order_are_sent_in_their_own(tmp_path):
    board = Board()
    several = reporter(tmp_path, mlflow=board)
    for number in (3, 0, 5, 1, 2, 4):
        several.report("images", number, LINES[number])
    assert board.points == POINTS


def test_a_tracker_that_fails_is_warned_of_once_and_gets_the_rest_when_the_run_is_resumed(tmp_path, caplog):
    gone, other = Board(fails_at=2), Board("two")
    report = reporter(tmp_path, mlflow=gone, wandb=other).follow("training", [])
    with caplog.at_level(logging.WARNING):
        for line in LINES[:4]:
            report(line)
    assert len(caplog.records) == 1
    assert "mlflow gets no more figures" in caplog.text
    assert "the server is gone" in caplog.text
    assert gone.points == POINTS[:2]
    assert other.points == POINTS[:4]
    gone.fails_at = None
    report = reporter(tmp_path, mlflow=gone, wandb=other).follow("training", LINES[:4])
    for line in LINES[4:]:
        report(line)
    assert gone.points == other.points == POINTS


def test_another_run_of_the_tracker_gets_everything_anew(tmp_path):
    for run in ("one", "two"):
        board = Board(run)
        reporter(tmp_path, mlflow=board).follow("training", LINES)
        assert board.points == POINTS


@pytest.mark.parametrize(
    ("error", "ending"),
    [(None, "finished"), (KeyboardInterrupt(), "interrupted"), (ConfigurationError("diverged"), "failed")],
)
def test_a_run_ends_in_its_trackers_as_it_ends(tmp_path, monkeypatch, error, ending):
    board = Board()
    monkeypatch.setattr("pipeline.tracking.reporter._open", lambda name, subject, run: board)

    def run():
        with reporting(("mlflow",), Subject(tmp_path / "out", "finetune", {}), tmp_path):
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(type(error)):
            run()
    assert board.endings == [ending]


def test_a_tracker_that_cannot_be_started_is_an_error_and_the_others_are_ended(tmp_path, monkeypatch):
    board = Board()

    def start(name, subject, run):
        if name == "wandb":
            raise ConnectionError("no answer from https://localhost:1")
        return board

    monkeypatch.setattr("pipeline.tracking.reporter._open", start)
    with (
        pytest.raises(MissingCapabilityError, match="wandb cannot be reported to") as caught,
        reporting(("mlflow", "wandb"), Subject(tmp_path / "out", "finetune", {}), tmp_path),
    ):
        pass
    assert "no answer from" in caught.value.why
    assert board.endings == ["failed"]


@pytest.mark.parametrize("given", ["mlflow,wandb", ["mlflow", "wandb"], ["mlflow, wandb", "mlflow"]])
def test_names_may_be_repeated_or_separated_by_commas(given):
    assert config("m", "d", report_to=given).report_to == ("mlflow", "wandb")


def test_an_unknown_tracker_is_refused_and_no_dump_holds_the_setting():
    with pytest.raises(ConfigurationError, match="finetune settings") as caught:
        config("m", "d", report_to="comet")
    assert "choose from mlflow, tensorboard, wandb" in caught.value.why
    named = config("m", "d", report_to="mlflow")
    assert named.model_dump(mode="json") == config("m", "d").model_dump(mode="json")


def test_missing_packages_are_all_named(monkeypatch):
    for name in ("mlflow", "wandb"):
        monkeypatch.setitem(__import__("sys").modules, name, None)  # as if they were not installed
    with pytest.raises(MissingCapabilityError) as caught:
        require_trackers(("mlflow", "wandb"))
    assert "mlflow is not installed; the package wandb is not installed" in caught.value.why
    assert "pip install 'fp8pipe[mlflow]'" in caught.value.fix
