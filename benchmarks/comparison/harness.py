"""Runs comparisons: all contenders take their turn in every round (A B C A B C ...), each in a process of its own.

So a slowdown of the machine affects all of them alike, and ratios are formed within a round. A contender that cannot be
started or fails is reported with the reason, and the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

from comparison.environments import Environment
from comparison.processes import ContenderError, Worker, environment_of, run_measured
from comparison.results import Metric, Result, Row, Target, reached, summarize

MIB = 1 << 20
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What all comparisons share.

    Attributes:
        work: directory for models, exports and logs.
        environments: the directory with the environments of peers.
        threads: number of threads of an engine.
        rounds: number of rounds; None for the comparison's own.
        quick: small sizes, to test the benchmark itself.
    """

    work: Path
    environments: Path
    threads: int
    rounds: int | None = None
    quick: bool = False

    def choose(self, usual: T, quick: T) -> T:
        """One of two sizes."""
        return quick if self.quick else usual


class Running(Protocol):
    """A contender that has started."""

    def round(self) -> Mapping[str, float]:
        """Take one turn; returns a figure per metric."""

    def close(self) -> None:
        """End it."""


@dataclass(frozen=True)
class Contender:
    """One side of a comparison.

    Attributes:
        name: its name in the table.
        environment: where it runs, for the versions.
        start: starts it; raises ContenderError if it cannot be started.
        ours: whether it is this project.
    """

    name: str
    environment: Environment
    start: Callable[[], Running]
    ours: bool = False


@dataclass(frozen=True)
class Comparison:
    """Contenders, and how to compare them.

    Attributes:
        title: heading.
        about: what is compared, on what, and what the figures mean.
        metrics: the figures.
        contenders: in the order in which they take their turns.
        baseline: the contender that the ratios refer to.
        rounds: number of measured rounds.
        warmup: number of rounds before these.
        targets: ratios to reach.
    """

    title: str
    about: str
    metrics: tuple[Metric, ...]
    contenders: tuple[Contender, ...]
    baseline: str
    rounds: int
    warmup: int = 0
    targets: tuple[Target, ...] = ()


@dataclass
class _Turn:
    """A contender while the comparison runs."""

    contender: Contender
    running: Running | None = None
    failure: str = ""
    samples: dict[str, list[float]] = field(default_factory=dict)

    def attempt(self, action: Callable[[], None]) -> None:
        """Do something with the contender, unless it has failed before."""
        if self.failure:
            return
        try:
            action()
        except Exception as error:  # whatever it is, the hours of the other contenders must not be lost
            self.failure, self.samples = _reason(error), {}
            self.end()  # a process that hangs would slow the others down

    def end(self) -> None:
        if self.running is not None:
            self.running.close()
            self.running = None

    def start(self) -> None:
        self.running = self.contender.start()

    def take(self, keep: bool) -> None:
        assert self.running is not None
        for name, value in self.running.round().items():
            if keep:
                self.samples.setdefault(name, []).append(float(value))

    def row(self) -> Row:
        chosen = self.contender
        return Row(
            name=chosen.name, ours=chosen.ours, versions=chosen.environment.versions(), failure=self.failure,
            samples=self.samples,
        )  # fmt: skip


def run_comparison(name: str, build: Callable[[Settings], Comparison], settings: Settings) -> Result:
    """Prepare a comparison, run its rounds, and summarize them.

    Args:
        name: as `--only` names it.
        build: creates the comparison; may take long, as it writes models and exports.
        settings: shared settings.

    Returns:
        The result. If the preparation fails, it states the reason and has no rows.
    """
    began = time.monotonic()
    try:
        chosen = build(settings)
    except Exception as error:  # as above, for the other comparisons
        return Result(name=name, title=name, about="", baseline="", rounds=0, seconds=time.monotonic() - began,
                      metrics=[], rows=[], failure=_reason(error))  # fmt: skip
    rounds = settings.rounds or chosen.rounds
    rows = summarize(take_turns(chosen.contenders, rounds, chosen.warmup), chosen.metrics, chosen.baseline)
    return Result(
        name=name, title=chosen.title, about=chosen.about, baseline=chosen.baseline, rounds=rounds,
        seconds=time.monotonic() - began, metrics=list(chosen.metrics), rows=rows,
        targets=reached(chosen.targets, rows),
    )  # fmt: skip


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, ContenderError) else f"{type(error).__name__}: {error}"


def take_turns(contenders: Sequence[Contender], rounds: int, warmup: int = 0) -> list[Row]:
    """Start all contenders, let them take their turns, and end them.

    Args:
        contenders: in the order of their turns.
        rounds: number of measured rounds.
        warmup: number of rounds before these, whose figures are dropped.

    Returns:
        One row per contender, with the figures of every round, or the reason why there are none.
    """
    turns = [_Turn(contender) for contender in contenders]
    try:
        for turn in turns:
            turn.attempt(turn.start)
        for number in range(warmup + rounds):
            for turn in turns:
                turn.attempt(lambda turn=turn, keep=number >= warmup: turn.take(keep))
    finally:
        for turn in turns:
            turn.end()
    return [turn.row() for turn in turns]


@dataclass(frozen=True)
class Command:
    """A contender that is a command: in every round it runs once, from start to end.

    Its figures are `seconds`, `processor_seconds`, `peak_mib` (resident memory), `anonymous_mib`, and what it says
    itself as a worker does.

    Attributes:
        command: the command line.
        log: the file that receives what the command writes.
        environment: the variables of its environment.
        before: called before every round, for instance to remove the last output.
        after: called after every round with a successful command; returns further figures.
    """

    command: Sequence[str | Path]
    log: Path
    environment: Mapping[str, str] | None = None
    before: Callable[[], None] = lambda: None
    after: Callable[[], Mapping[str, float]] = dict

    def round(self) -> dict[str, float]:
        """Run the command."""
        self.before()
        done = run_measured(self.command, self.log, environment=self.environment)
        figures = {
            "seconds": done.seconds, "processor_seconds": done.processor_seconds,
            "peak_mib": done.resident_bytes / MIB, "anonymous_mib": done.anonymous_bytes / MIB,
        }  # fmt: skip
        return figures | dict(done.figures) | dict(self.after())

    def close(self) -> None:
        """Nothing runs between the rounds."""


def worker(
    name: str, where: Environment, script: Path, arguments: Sequence[str | Path], log: Path, *, ours: bool = False,
    **variables: str,
) -> Contender:  # fmt: skip
    """A contender that is a worker: a script that loads what it measures, then does its work once per round.

    Args:
        name: its name in the table.
        where: the environment that it runs in.
        script: the script.
        arguments: its command line.
        log: the file that receives its standard error.
        ours: whether it is this project.
        **variables: further variables of the process.
    """

    def start() -> Worker:
        given = environment_of(project=where.project, **variables)
        return Worker([where.python(), script, *arguments], log, environment=given)

    return Contender(name, where, start, ours)
