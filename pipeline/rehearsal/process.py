"""A rehearsal as a process of its own, since peaks of memory belong to processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fp8pipe.errors import Fp8PipeError, OutOfMemoryError
from fp8pipe.phases import PhaseMeter

__all__ = ["Measured", "answer", "read_job", "rehearse", "size_of"]

_JOB, _ANSWER = "job.json", "answer.json"
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
