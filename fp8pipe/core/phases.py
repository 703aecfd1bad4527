"""The phases of a stage: announced by the stage itself, and measured by whoever listens.

A stage says `enter_phase("load")` where another kind of work begins. Nothing happens then, unless a `PhaseMeter` is
active: a plan runs a stage on a smaller model, and memory and time of each phase have to be told apart, because
each grows in its own way.
"""

from __future__ import annotations

import resource
import time
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

__all__ = ["Phase", "PhaseMeter", "can_measure", "enter_phase"]

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK: Final = "5"  # see proc(5)
_FIRST: Final = "start"
_meter: ContextVar[PhaseMeter | None] = ContextVar("phase_meter", default=None)


def enter_phase(name: str) -> None:
    """From here on `name` goes on; it may come again. Costs nothing where nobody listens."""
    meter = _meter.get()
    if meter is not None:
        meter.enter(name)


def can_measure() -> bool:
    """Whether the kernel tells peaks of memory, and lets them be reset: Linux does."""
    return _STATUS.exists() and _CLEAR.exists()


@dataclass(slots=True)
class Phase:
    """What a phase took."""

    peak_bytes: int = 0  # largest resident memory while it went on, with what was resident before
    seconds: list[float] = field(default_factory=list)  # wall time of each of its occurrences


class PhaseMeter:
    """A context manager that measures the phases entered inside it. The first, `start`, is what went before."""

    def __init__(self) -> None:
        self.phases: dict[str, Phase] = {}
        self._name, self._began = _FIRST, time.perf_counter()
        self._token: Token[PhaseMeter | None] | None = None

    def __enter__(self) -> Self:
        self._token = _meter.set(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.enter(_FIRST)
        if self._token is not None:
            _meter.reset(self._token)

    def enter(self, name: str) -> None:
        """End the phase that goes on, and begin `name`."""
        phase = self.phases.setdefault(self._name, Phase())
        phase.peak_bytes = max(phase.peak_bytes, _peak_bytes())
        phase.seconds.append(time.perf_counter() - self._began)
        _CLEAR.write_text(_RESET_PEAK)
        self._name, self._began = name, time.perf_counter()

    def document(self) -> dict[str, Any]:
        """The phases as plain data, and the largest child that has ended."""
        return {
            "phases": {name: {"peak_bytes": p.peak_bytes, "seconds": p.seconds} for name, p in self.phases.items()},
            "child_peak_bytes": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
        }


def _peak_bytes() -> int:
    return int(_STATUS.read_text().split("VmHWM:")[1].split()[0]) * 1024
