"""Plans, the output of `--dry-run`: what a command would read and write, and which resources it would need.

Peak memory is the peak resident memory of the command's largest process, as the kernel reports it (`ru_maxrss`). Disk
space is the largest total size of its output and checkpoints. Both are estimated from the shapes of the model; `notes`
states which parts were not measured.

Where memory and time are measured, a dry run executes a small part of the stage and measures each phase separately,
because phases scale differently with the size of the model. A stage marks the start of a phase with
`enter_phase("load")`, which does nothing unless a `PhaseMeter` is active.
"""

from __future__ import annotations

import dataclasses
import resource
import time
from collections.abc import Iterable, Mapping
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from fp8pipe.core.errors import OutOfMemoryError
from fp8pipe.core.machine import (
    available_bytes,
    distribution_version,
    format_bytes,
    free_bytes,
    memory_bytes,
    swap_bytes,
)

# For each distribution, the extra of fp8pipe that installs it.
_EXTRAS: Final = {
    "gguf": "samples", "accelerate": "samples", "chatterbot-corpus": "samples", "scikit-learn": "samples",
    "peft": "train", "bitsandbytes": "train", "timm": "vit", "torchvision": "vit", "pillow": "vit", "onnx": "onnx",
    "onnxruntime": "onnx", "onnxscript": "onnx", "onnx-ir": "onnx", "tensorrt": "trt", "tensorrt-rtx": "trt-rtx",
    "fastapi": "serve", "uvicorn": "serve", "prometheus-client": "serve", "lm-eval": "evaluate",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Missing:
    """Something that the command needs and that this machine lacks.

    Attributes:
        what: what is missing, with the needed and available amounts.
        fix: what the user can do about it.
    """

    what: str
    fix: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a command would read, write and need on this machine."""

    reads: tuple[str, ...]  # files and directories, or names of models and data sets, that are read
    writes: tuple[str, ...]  # files and directories that are written
    peak_memory_bytes: int | None  # peak resident memory of the largest process; None if unknown
    disk_bytes: int  # largest total size of output and checkpoints during the run
    output_bytes: int  # size of the finished output
    seconds: float | None = None  # wall time on this machine at its current load; None if not estimated
    hardware: str = "a CPU"  # description of the required hardware
    packages: tuple[str, ...] = ()  # required distributions
    missing: tuple[Missing, ...] = ()  # everything that this machine lacks
    notes: tuple[str, ...] = ()  # how the figures were obtained, and what else the user should know in advance
    facts: Mapping[str, Any] = field(default_factory=dict)  # figures specific to this command

    def document(self) -> dict[str, Any]:
        """The plan as JSON-compatible data, with `facts` merged into the top level."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "facts"}
        fields["missing"] = [dataclasses.asdict(item) for item in self.missing]
        return {**self.facts, **{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}}

    @classmethod
    def of_document(cls, document: Mapping[str, Any]) -> Plan:
        """The plan from the result of `document`."""
        names = {f.name for f in dataclasses.fields(cls)} - {"facts"}
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in document.items() if k in names}
        known["missing"] = tuple(Missing(**item) for item in document.get("missing", ()))
        return cls(**known, facts={k: v for k, v in document.items() if k not in names})

    def text(self) -> str:
        """The plan as text for the user."""
        disk = f"{format_bytes(self.disk_bytes)} at most, {format_bytes(self.output_bytes)} at the end"
        peak = self.peak_memory_bytes
        rows = [
            *(("reads", item) for item in self.reads),
            *(("writes", item) for item in self.writes),
            *(_row(name, shown) for name, value in self.facts.items() if (shown := _shown(value, name))),
            ("memory", "not known" if peak is None else f"{format_bytes(peak)} at its peak"),
            ("disk", disk),
            ("time", "not estimated" if self.seconds is None else f"about {_duration(self.seconds)}"),
            ("hardware", self.hardware),
            ("packages", ", ".join(self.packages) or "none beyond fp8pipe's own"),
            *(("MISSING", f"{item.what}; {item.fix}") for item in self.missing),
            *(("note", note) for note in self.notes),
        ]
        return "plan (nothing was written)\n" + "\n".join(f"  {name:<16}  {value}" for name, value in rows)


def missing_packages(names: Iterable[str]) -> tuple[Missing, ...]:
    """An entry for each of these distributions that is not installed; the packages are not imported."""
    missing = [name for name in names if distribution_version(name) is None]
    return tuple(Missing(f"the package {name} is not installed", install_command(name)) for name in missing)


def install_command(name: str) -> str:
    """The pip command that installs a distribution, through the extra of fp8pipe that includes it if there is one."""
    return f"pip install 'fp8pipe[{_EXTRAS[name]}]'" if name in _EXTRAS else f"pip install {name}"


def missing_memory(peak_bytes: int | None, fix: str) -> tuple[Missing, ...]:
    """One entry, with the advice `fix`, if more memory is needed than is available now; otherwise empty."""
    available = available_bytes()
    if peak_bytes is None or peak_bytes <= available:
        return ()
    return (Missing(f"memory: {format_bytes(peak_bytes)} at the peak, {format_bytes(available)} available now", fix),)


def missing_disk(output: Path, need_bytes: int) -> tuple[Missing, ...]:
    """One entry if more disk space is needed than is free at `output`; otherwise empty."""
    free = free_bytes(output)
    if need_bytes <= free:
        return ()
    what = f"disk: {format_bytes(need_bytes)} needed, {format_bytes(free)} free at {output}"
    return (Missing(what, "free space, or give an output on another disk"),)


def refuse_impossible(least_bytes: int, what: str) -> None:
    """Raise an error if something cannot fit into this machine's memory, even if nothing else runs.

    Args:
        least_bytes: lower bound for the memory that it needs, in bytes.
        what: its description in the error message.

    Raises:
        OutOfMemoryError: `least_bytes` exceeds total memory plus swap.
    """
    total = memory_bytes() + swap_bytes()
    if least_bytes <= total:
        return
    least = format_bytes(least_bytes)
    raise OutOfMemoryError(
        f"{what} cannot fit into this machine's memory",
        why=f"it takes at least {least}; memory and swap are {format_bytes(total)}",
        fix="use a smaller model or a larger machine; --dry-run shows what a run needs",
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def by_reason(reasons: Mapping[str, str]) -> list[str]:
    """Group names by reason, as one text per reason: `a, b, c and 5 more (reason)`.

    Args:
        reasons: for each name, its reason.
    """
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    found = []
    for reason, names in groups.items():
        more = len(names) - _MOST_NAMES
        found.append(f"{', '.join(names[:_MOST_NAMES])}{f' and {more} more' if more > 0 else ''} ({reason})")
    return found


def _row(name: str, shown: str) -> tuple[str, str]:
    return name.removesuffix(_BYTES).replace("_", " "), shown


def _shown(value: Any, name: str = "") -> str:
    if name.endswith(_BYTES) and isinstance(value, int):
        return format_bytes(value)
    if isinstance(value, Mapping):
        words = all(isinstance(item, str) for item in value.values())
        return ", ".join(by_reason(value) if words else (f"{key} ({item})" for key, item in value.items()))
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


_MOST_NAMES: Final = 3
_BYTES: Final = "_bytes"  # ends the names of facts in bytes
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_FIRST: Final = "start"
_meter: ContextVar[PhaseMeter | None] = ContextVar("phase_meter", default=None)


def enter_phase(name: str) -> None:
    """Mark the start of a phase, which may occur repeatedly. Does nothing unless a `PhaseMeter` is active."""
    meter = _meter.get()
    if meter is not None:
        meter.enter(name)


def can_measure() -> bool:
    """Whether the kernel can report and reset the peak memory of a process, as `PhaseMeter` requires (Linux)."""
    return _STATUS.exists() and _CLEAR.exists()


@dataclass(slots=True)
class Phase:
    """Measured memory and time of a phase."""

    peak_bytes: int = 0  # peak resident memory of the process during the phase
    seconds: list[float] = field(default_factory=list)  # wall time of each occurrence


class PhaseMeter:
    """A context manager that measures the phases that are entered inside it.

    The time before the first phase counts as a phase named `start`.
    """

    def __init__(self) -> None:
        self.phases: dict[str, Phase] = {}
        self._name, self._began = _FIRST, time.perf_counter()
        self._token: Token[PhaseMeter | None] | None = None

    def __enter__(self) -> Self:
        self._token = _meter.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        self.enter(_FIRST)
        if self._token is not None:
            _meter.reset(self._token)

    def enter(self, name: str) -> None:
        """End the current phase, and begin the phase `name`."""
        phase = self.phases.setdefault(self._name, Phase())
        peak_bytes = int(_STATUS.read_text().split("VmHWM:")[1].split()[0]) * 1024
        phase.peak_bytes = max(phase.peak_bytes, peak_bytes)
        phase.seconds.append(time.perf_counter() - self._began)
        _CLEAR.write_text("5")  # resets the peak, see proc(5)
        self._name, self._began = name, time.perf_counter()

    def document(self) -> dict[str, Any]:
        """The phases, and the peak memory of the largest child process that has ended, as JSON-compatible data."""
        return {
            "phases": {name: {"peak_bytes": p.peak_bytes, "seconds": p.seconds} for name, p in self.phases.items()},
            "child_peak_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        }
