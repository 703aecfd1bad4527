"""The sections of a report, in the order in which they are read; a module each."""

from collections.abc import Callable
from typing import Final

from fp8pipe.report.blocks import Section
from fp8pipe.report.sections import (
    accuracy,
    by_layer,
    parity,
    pictures,
    precision,
    provenance,
    reproduce,
    speed,
    training,
    verdicts,
    warnings,
)
from fp8pipe.report.subject import Subject

__all__ = ["SECTIONS"]

SECTIONS: Final[tuple[Callable[[Subject], Section], ...]] = (
    verdicts.section,
    training.section,
    by_layer.section,
    pictures.section,
    accuracy.section,
    parity.section,
    precision.section,
    speed.section,
    provenance.section,
    reproduce.section,
    warnings.section,
)
