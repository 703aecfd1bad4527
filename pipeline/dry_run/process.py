"""Execute dry runs in separate processes (peak memory is measured per process) and extrapolate to the real run.

A dry run has fewer images than the real run. Memory, size and time of each phase are affine functions of that number,
so two dry runs suffice to extrapolate, without hand-tuned constants.
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
# Errors that the real command would raise for the same settings. The parent process recognizes them by exit code.
_REFUSALS: Final = (ConfigurationError, MissingCapabilityError, BadArtifactError, OutOfMemoryError)
_LAST: Final = 400  # characters of a failed dry run's stderr to show


@dataclass(frozen=True, slots=True)
class Measured:
    """The measurements of a dry run.

    Attributes:
        peaks: for each phase, the largest resident memory, bytes.
        seconds: for each phase, the wall time of each of its occurrences.
        child_peak: largest resident memory of any process that the dry run started, bytes.
        sizes: sizes on disk, bytes: `step` (checkpoints of steps), `kept` (the rest of the measured part of the
            artifact) and `output` (the finished artifact).
        facts: other results returned by the dry run of the stage.
    """

    peaks: dict[str, int]
    seconds: dict[str, list[float]]
    child_peak: int
    sizes: dict[str, int]
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Scaled:
    """Extrapolates from dry runs with one or two numbers of images to the real number.

    Attributes:
        runs: (number of images, measurements) of each of the one or two dry runs.
        n: the number of images in the real run.
    """

    runs: tuple[tuple[int, Measured], ...]
    n: int

    def peak(self, phase: str) -> int:
        """Peak memory of a phase, bytes."""
        return int(self._at_n([(n, m.peaks.get(phase, 0)) for n, m in self.runs]))

    def phases(self) -> list[str]:
        """Names of the phases."""
        return list(self.runs[-1][1].peaks)

    def seconds(self, phase: str, *, least: bool = False) -> float:
        """Wall time of one occurrence of a phase, seconds: the mean over all occurrences, or the minimum if `least`."""
        how = min if least else fmean
        points = [(n, how(m.seconds[phase])) for n, m in self.runs if m.seconds.get(phase)]
        return self._at_n(points) if points else 0.0

    def size(self, name: str) -> int:
        """Size of the output called `name`, bytes."""
        return int(self._at_n([(n, m.sizes[name]) for n, m in self.runs]))

    @property
    def child_peak(self) -> int:
        """Peak memory of the largest process that the stage starts, bytes."""
        return int(self._at_n([(n, m.child_peak) for n, m in self.runs]))

    def _at_n(self, points: Sequence[tuple[int, float]]) -> float:
        """Extrapolate one or two points to the real number; a negative slope counts as zero."""
        *before, (last, value) = sorted(points)
        if not before:
            return value
        slope = (value - before[0][1]) / (last - before[0][0])
        return value + max(0.0, slope) * (self.n - last)


def dry_run(module: str, job: Mapping[str, Any], folder: Path) -> Measured:
    """Execute a dry run as `python -m module` and return its measurements.

    Args:
        module: a module whose main program calls `perform`.
        job: the job, as JSON-serializable data.
        folder: scratch directory for the job, the artifact and the answer; created if missing.

    Raises:
        OutOfMemoryError: the dry run was killed for lack of memory.
        ConfigurationError, MissingCapabilityError, BadArtifactError: the stage rejects the job, as the real command
            would.
        Fp8PipeError: the dry run failed in another way; the error includes the end of its stderr.
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
    """Measures the phases of a stage, and the size of its checkpoints before the stage deletes them.

    Args:
        partial: directory of the unfinished artifact.
        last: name of the phase at whose beginning all checkpoints exist; sizes are measured then.
        kept: path below `partial` whose size, without the checkpoints of steps, is measured as `sizes["kept"]`.
    """

    def __init__(self, partial: Path, last: str, kept: str = ".") -> None:
        super().__init__()
        self._checkpoints, self._kept, self._last = partial / "checkpoints", partial / kept, last
        self.sizes = {"step": 0, "kept": 0}

    def enter(self, name: str) -> None:
        """End the current phase and begin the phase `name`."""
        super().enter(name)
        if name == self._last:
            step = sum(size_of(folder) for folder in self._checkpoints.glob("step-*"))
            self.sizes = {"step": step, "kept": size_of(self._kept) - step}


def perform(run: Callable[[dict[str, Any], Path], tuple[CheckpointMeter, dict[str, Any]]]) -> int:
    """Perform a dry run in this process: the counterpart of `dry_run`, which starts the process.

    The scratch directory is the process's first argument. The measurements, or an error of the stage, are written to
    a file there.

    Args:
        run: called with the job and the path of the artifact; returns the measurements and facts.

    Returns:
        The exit code of the process.
    """
    import fp8pipe.cli  # noqa: F401 (imported because the real command's memory use includes it)
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
    """Total size in bytes of all files below the directory `path`."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
