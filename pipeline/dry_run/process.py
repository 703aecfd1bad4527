"""A rehearsal as a process of its own, since peaks of memory belong to processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fp8pipe.core.errors import (
    BadArtifactError,
    ConfigurationError,
    Fp8PipeError,
    MissingCapabilityError,
    OutOfMemoryError,
)
from fp8pipe.core.phases import PhaseMeter

__all__ = ["Measured", "answer", "perform", "read_job", "rehearse", "size_of"]

_JOB, _ANSWER, _REFUSAL = "job.json", "answer.json", "refusal.json"
# What the command itself would say of the same settings; the exit code tells which.
_REFUSALS: Final = (ConfigurationError, MissingCapabilityError, BadArtifactError, OutOfMemoryError)
_LAST: Final = 400  # characters of a failed rehearsal's own words


@dataclass(frozen=True, slots=True)
class Measured:
    """What a rehearsal took.

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


def rehearse(module: str, job: Mapping[str, Any], folder: Path) -> Measured:
    """Run `python -m module` on a job.

    Args:
        module: ends with `answer`.
        job: plain data.
        folder: scratch, its own.

    Raises:
        OutOfMemoryError: even the rehearsal was killed for memory.
        ConfigurationError, MissingCapabilityError, BadArtifactError: the stage refuses, as the command would.
        Fp8PipeError: it failed otherwise; with its last words.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _JOB).write_text(json.dumps(dict(job)))
    ended = subprocess.run([sys.executable, "-P", "-m", module, str(folder)], capture_output=True, text=True)
    if ended.returncode == -signal.SIGKILL:
        raise OutOfMemoryError(
            "not even a rehearsal on a part of the model fits into memory", why="it was killed",
            fix="use a smaller batch, shorter sequences or a smaller model",
        )  # fmt: skip
    if (folder / _REFUSAL).is_file():
        said = json.loads((folder / _REFUSAL).read_text())
        kind = next((one for one in _REFUSALS if one.exit_code == ended.returncode), Fp8PipeError)
        raise kind(said["what"], why=said["why"], fix=said["fix"])
    if ended.returncode or not (folder / _ANSWER).is_file():
        raise Fp8PipeError("the rehearsal behind this plan failed", why=ended.stderr.strip()[-_LAST:])
    found = json.loads((folder / _ANSWER).read_text())
    phases = found["phases"]
    return Measured(
        peaks={name: phase["peak_bytes"] for name, phase in phases.items()},
        seconds={name: phase["seconds"] for name, phase in phases.items()},
        child_peak=found["child_peak_bytes"],
        sizes=found["sizes"],
        facts=found["facts"],
    )


def perform(main: Callable[[Path], None]) -> int:
    """Run a rehearsal in its own process; the exit code. What the stage refuses is left for who asked."""
    folder = Path(sys.argv[1])
    try:
        main(folder)
    except Fp8PipeError as error:
        (folder / _REFUSAL).write_text(json.dumps({"what": error.what, "why": error.why, "fix": error.fix}))
        return error.exit_code
    return 0


def read_job(folder: Path) -> dict[str, Any]:
    """The job, in the rehearsing process."""
    return dict(json.loads((folder / _JOB).read_text()))


def answer(folder: Path, meter: PhaseMeter, sizes: Mapping[str, int], facts: Mapping[str, Any]) -> None:
    """Tell what was measured, in the rehearsing process."""
    document = {**meter.document(), "sizes": dict(sizes), "facts": dict(facts)}
    scratch = folder / f"{_ANSWER}.writing"
    scratch.write_text(json.dumps(document))
    os.replace(scratch, folder / _ANSWER)


def size_of(path: Path) -> int:
    """Bytes of all files below `path`."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
