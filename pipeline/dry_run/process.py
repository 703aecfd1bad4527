"""A dry run as a process of its own, since peaks of memory belong to processes; and what two of them tell.

What repeats is layers for a language model, images for a vision model. Memory, size and time of each phase are affine
in their number, so two dry runs tell them for any number; no constant is made by hand.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from fp8pipe.core.errors import (
    BadArtifactError,
    ConfigurationError,
    Fp8PipeError,
    MissingCapabilityError,
    OutOfMemoryError,
)
from fp8pipe.core.plan import PhaseMeter

_JOB, _ANSWER, _REFUSAL = "job.json", "answer.json", "refusal.json"
# What the command itself would say of the same settings; the exit code tells which.
_REFUSALS: Final = (ConfigurationError, MissingCapabilityError, BadArtifactError, OutOfMemoryError)
_LAST: Final = 400  # characters of a failed dry run's own words


@dataclass(frozen=True, slots=True)
class Measured:
    """What a dry run took.

    Attributes:
        peaks: by phase, largest resident memory, bytes.
        seconds: by phase, wall time of each of its occurrences.
        child_peak: largest resident memory of a process that it started, bytes.
        sizes: what it wrote, by name, bytes.
        facts: whatever else its stage tells.
    """

    peaks: dict[str, int]
    seconds: dict[str, list[float]]
    child_peak: int
    sizes: dict[str, int]
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Scaled:
    """Dry runs at one or two numbers of what repeats, seen at the real number.

    Attributes:
        runs: (number, what was measured).
        n: the real number.
    """

    runs: tuple[tuple[int, Measured], ...]
    n: int

    def peak(self, phase: str, known: Sequence[int] = (), real: int = 0) -> int:
        """Peak memory of a phase, bytes.

        Args:
            phase: its name.
            known: for each run, bytes in it that are no affine function of the number.
            real: those bytes at the real number.
        """
        known = known or [0] * len(self.runs)
        points = [(n, m.peaks.get(phase, 0) - extra) for (n, m), extra in zip(self.runs, known, strict=True)]
        return int(self._at_n(points)) + real

    def phases(self) -> list[str]:
        """Names of the phases."""
        return list(self.runs[-1][1].peaks)

    def seconds(self, phase: str, *, least: bool = False) -> float:
        """Mean (or least) wall time of one occurrence of a phase, seconds."""
        how = min if least else fmean
        points = [(n, how(m.seconds[phase])) for n, m in self.runs if m.seconds.get(phase)]
        return self._at_n(points) if points else 0.0

    def size(self, name: str) -> int:
        """Bytes of something that is written."""
        return int(self._at_n([(n, m.sizes[name]) for n, m in self.runs]))

    @property
    def child_peak(self) -> int:
        """Largest process that the stage starts, bytes."""
        return int(self._at_n([(n, m.child_peak) for n, m in self.runs]))

    def _at_n(self, points: Sequence[tuple[int, float]]) -> float:
        """The value at the real number, through one or two points; never less than the larger one, never falling."""
        *before, (last, value) = sorted(points)
        if not before:
            return value
        slope = (value - before[0][1]) / (last - before[0][0])
        return value + max(0.0, slope) * (self.n - last)


def dry_run(module: str, job: Mapping[str, Any], folder: Path) -> Measured:
    """Run `python -m module`, which calls `perform`, on a job of plain data, in a scratch folder of its own.

    Raises:
        OutOfMemoryError: even the dry run was killed for memory.
        ConfigurationError, MissingCapabilityError, BadArtifactError: the stage refuses, as the command would.
        Fp8PipeError: it failed otherwise; with its last words.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _JOB).write_text(json.dumps(dict(job)))
    ended = subprocess.run([sys.executable, "-P", "-m", module, str(folder)], capture_output=True, text=True)
    if ended.returncode == -signal.SIGKILL:
        raise OutOfMemoryError(
            "not even a dry run on a part of the model fits into memory", why="it was killed",
            fix="use a smaller batch, shorter sequences or a smaller model",
        )  # fmt: skip
    if (folder / _REFUSAL).is_file():
        said = json.loads((folder / _REFUSAL).read_text())
        kind = next((one for one in _REFUSALS if one.exit_code == ended.returncode), Fp8PipeError)
        raise kind(said["what"], why=said["why"], fix=said["fix"])
    if ended.returncode or not (folder / _ANSWER).is_file():
        raise Fp8PipeError("the dry run behind this plan failed", why=ended.stderr.strip()[-_LAST:])
    return Measured(**json.loads((folder / _ANSWER).read_text()))


class CheckpointMeter(PhaseMeter):
    """Measures phases, and checkpoints before they are removed.

    Args:
        partial: the unfinished artifact.
        last: the phase whose beginning finds all checkpoints.
        kept: the part of the artifact whose size beside the checkpoints of steps is wanted.
    """

    def __init__(self, partial: Path, last: str, kept: str = ".") -> None:
        super().__init__()
        self._checkpoints, self._kept, self._last = partial / "checkpoints", partial / kept, last
        self.sizes = {"step": 0, "kept": 0}

    def enter(self, name: str) -> None:
        """End the phase that goes on, and begin `name`."""
        super().enter(name)
        if name == self._last:
            step = sum(size_of(folder) for folder in self._checkpoints.glob("step-*"))
            self.sizes = {"step": step, "kept": size_of(self._kept) - step}


def perform(run: Callable[[dict[str, Any], Path], tuple[CheckpointMeter, dict[str, Any]]]) -> int:
    """Carry a dry run out, in its own process; the exit code. What the stage refuses is left for who asked.

    `run` takes the job and the place of the artifact, and returns what was measured, and facts.
    """
    import fp8pipe.cli  # noqa: F401 (the real run holds it, too)
    from fp8pipe.numerics.bf16 import widen_bf16_products

    folder = Path(sys.argv[1])
    try:
        widen_bf16_products()
        meter, facts = run(json.loads((folder / _JOB).read_text()), folder / "artifact")
    except Fp8PipeError as error:
        (folder / _REFUSAL).write_text(json.dumps({"what": error.what, "why": error.why, "fix": error.fix}))
        return error.exit_code
    found = meter.document()
    answer = Measured(
        peaks={name: phase["peak_bytes"] for name, phase in found["phases"].items()},
        seconds={name: phase["seconds"] for name, phase in found["phases"].items()},
        child_peak=found["child_peak_bytes"],
        sizes={**meter.sizes, "output": size_of(folder / "artifact")},
        facts=facts,
    )
    (folder / _ANSWER).write_text(json.dumps(asdict(answer)))
    return 0


def size_of(path: Path) -> int:
    """Bytes of all files below `path`."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
