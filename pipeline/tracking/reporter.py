"""Sends the figures of a run to its trackers, each of them once, and keeps the run going when a tracker fails.

What a run reports are lines, in series: the lines of `metrics.jsonl`, and the losses of finished batches of images. A
line is identified by its series and its number there, so a resumed run, which goes through some lines again, knows how
many of them each tracker has: `trackers.json`, beside the checkpoints, counts them, and holds what identifies the
tracker's run. A tracker that is new, or that failed before, gets the lines that it lacks.

A line is counted before it is sent. A process that is killed in between thus loses a point in a diagram, and no point
is ever there twice.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from fp8pipe.artifact import Artifact
from fp8pipe.core.errors import Fp8PipeError, InterruptedRunError, MissingCapabilityError, class_and_one_line
from pipeline.tracking.tracker import Ending, Figures, Subject, Tracker

TRACKERS_FILE: Final = "trackers.json"  # in the unfinished directory; no part of the artifact
_LOG = logging.getLogger(__name__)


def _open(name: str, subject: Subject, run: str | None) -> Tracker:
    """Start a run of a tracker, or continue the run that `run` identifies."""
    if name == "tensorboard":
        from pipeline.tracking.to_tensorboard import TensorboardTracker

        return TensorboardTracker(subject, run)
    if name == "mlflow":
        from pipeline.tracking.to_mlflow import MlflowTracker

        return MlflowTracker(subject, run)
    from pipeline.tracking.to_wandb import WandbTracker

    return WandbTracker(subject, run)


class Reporter:
    """The open trackers of a run; without any, it does nothing.

    Args:
        trackers: by name.
        notes: what an earlier process of this run has noted in `file`, by name of the tracker.
        file: where it is noted.
    """

    def __init__(self, trackers: Mapping[str, Tracker], notes: dict[str, Any], file: Path) -> None:
        self._trackers, self._notes, self._file = dict(trackers), notes, file
        self._lines: dict[str, dict[int, Figures]] = {}
        for name, tracker in trackers.items():
            if notes.get(name, {}).get("run") != tracker.run:
                notes[name] = {"run": tracker.run, "sent": {}}
        if trackers:
            self._note()

    def report(self, series: str, number: int, line: Figures) -> None:
        """Report a line of a series.

        Args:
            series: name of the series.
            number: number of the line, from 0. Lines may come in any order; they are sent in that of their numbers.
            line: its `step`, and numbers by name.
        """
        if not self._trackers:
            return
        lines = self._lines.setdefault(series, {})
        lines[number] = line
        for name in list(self._trackers):
            self._catch_up(name, series, lines)

    def follow(self, series: str, history: Sequence[Figures]) -> Callable[[Figures], None]:
        """Report all lines that a series has so far; returns the function that reports its next line."""
        for number, line in enumerate(history):
            self.report(series, number, line)
        following = iter(range(len(history), 1 << 62))
        return lambda line: self.report(series, next(following), line)

    def tag(self, artifact: Artifact) -> None:
        """Report what was written: digests and path."""
        facts = {"digest": artifact.digest, "content": artifact.content, "artifact": str(artifact.root)}
        for name, tracker in list(self._trackers.items()):
            with self._tolerated(name):
                tracker.tag(facts)

    def close(self, ending: Ending) -> None:
        """End all runs."""
        for name, tracker in list(self._trackers.items()):
            with self._tolerated(name):
                tracker.close(ending)
        self._trackers.clear()

    def _catch_up(self, name: str, series: str, lines: Mapping[int, Figures]) -> None:
        sent = self._notes[name]["sent"]
        while name in self._trackers and (number := sent.get(series, 0)) in lines:
            figures = {key: value for key, value in lines[number].items() if key != "step"}
            sent[series] = number + 1
            self._note()
            with self._tolerated(name, series, number):
                self._trackers[name].log(int(lines[number]["step"]), figures)

    @contextmanager
    def _tolerated(self, name: str, series: str | None = None, number: int = 0) -> Iterator[None]:
        """A context in which a failure of a tracker is only warned of; that tracker then gets nothing more.

        `number` is that of the line of `series` that is sent, and was not received after all.
        """
        try:
            yield
        except Exception as error:
            if series is not None:
                self._notes[name]["sent"][series] = number
            del self._trackers[name]
            _LOG.warning(
                "%s gets no more figures of this run, which goes on without it: %s. All figures are also in the "
                "artifact; if the run is resumed, %s gets those that it lacks", name, _brief(error), name,
            )  # fmt: skip
            if self._file.parent.is_dir():  # not after the artifact was completed
                self._note()

    def _note(self) -> None:
        scratch = self._file.with_suffix(".writing")
        scratch.write_text(json.dumps(self._notes), encoding="utf-8")
        os.replace(scratch, self._file)


@contextmanager
def reporting(names: Sequence[str], subject: Subject, folder: Path) -> Iterator[Reporter]:
    """The reporter of a run, for as long as the context lasts; how the context ends is how the trackers' runs end.

    Args:
        names: names of trackers.
        subject: the run.
        folder: the unfinished directory of the artifact, where it is noted what the trackers have.

    Raises:
        MissingCapabilityError: a tracker cannot be started: its package is broken, its server does not answer, or it
            wants a login.
    """
    file = folder / TRACKERS_FILE
    notes = _read(file) if names else {}
    trackers: dict[str, Tracker] = {}
    reporter: Reporter | None = None
    ending: Ending = "failed"
    try:
        for name in names:
            trackers[name] = _started(name, subject, notes.get(name, {}).get("run"))
            _LOG.info("reporting to %s: %s", name, trackers[name].place)
        reporter = Reporter(trackers, notes, file)
        yield reporter
        ending = "finished"
    except (KeyboardInterrupt, InterruptedRunError):
        ending = "interrupted"
        raise
    finally:
        (reporter or Reporter(trackers, notes, file)).close(ending)


def _started(name: str, subject: Subject, run: str | None) -> Tracker:
    try:
        return _open(name, subject, run)
    except Fp8PipeError:
        raise
    except Exception as error:
        raise MissingCapabilityError(
            f"{name} cannot be reported to",
            why=_brief(error),
            fix=f"see that {name} works here (server, login), or leave it out of --report-to",
        ) from error


def _read(file: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):  # absent, or lost in a crash: the trackers' runs then start anew
        notes = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(notes, dict):
            return notes
    return {}


def _brief(error: Exception) -> str:
    return class_and_one_line(error)
