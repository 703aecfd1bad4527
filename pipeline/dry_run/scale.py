"""From two rehearsals to the real number of layers or images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from pipeline.dry_run.process import Measured

__all__ = ["Affine", "Scaled"]


@dataclass(frozen=True, slots=True)
class Affine:
    """`value(n)` through one or two measured points; never less than the larger one, never falling."""

    points: tuple[tuple[int, float], ...]

    def at(self, n: int) -> float:
        """The value for `n`."""
        *before, (last, value) = sorted(self.points)
        if not before:
            return value
        slope = (value - before[0][1]) / (last - before[0][0])
        return value + max(0.0, slope) * (n - last)


@dataclass(frozen=True, slots=True)
class Scaled:
    """Rehearsals at one or two numbers of what repeats, seen at the real number.

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
        return int(Affine(tuple(points)).at(self.n)) + real

    def phases(self) -> list[str]:
        """Names of the phases."""
        return list(self.runs[-1][1].peaks)

    def seconds(self, phase: str, *, least: bool = False) -> float:
        """Mean (or least) wall time of one occurrence of a phase, seconds."""
        how = min if least else fmean
        points = tuple((n, how(m.seconds[phase])) for n, m in self.runs if m.seconds.get(phase))
        return Affine(points).at(self.n) if points else 0.0

    def size(self, name: str) -> int:
        """Bytes of something that is written."""
        return int(Affine(tuple((n, float(m.sizes[name])) for n, m in self.runs)).at(self.n))

    @property
    def child_peak(self) -> int:
        """Largest process that the stage starts, bytes."""
        return int(Affine(tuple((n, float(m.child_peak)) for n, m in self.runs)).at(self.n))
