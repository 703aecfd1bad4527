"""A number as it is shown, bound to the place it was read from; and verdicts, digests and words as table cells."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from markupsafe import Markup

__all__ = ["Badge", "Derive", "Digest", "Figure", "Form", "Quote", "number_of", "shown"]


class Form(StrEnum):
    """How a number is written."""

    PLAIN = "plain"
    COUNT = "count"
    LOSS = "loss"
    RATIO = "ratio"
    PERCENT = "percent"
    BYTES = "bytes"
    SECONDS = "seconds"


class Derive(StrEnum):
    """How one number is made of several."""

    NONE = ""
    SUM = "sum"
    COUNT = "count"


@dataclass(frozen=True, slots=True)
class Figure:
    """A number and where it stands.

    Attributes:
        value: as it was read.
        source: `FILE#/json/pointer`, relative to the report's subject.
        form: how it is written.
        derive: how it was made of the values at `source`, where they are several.
        unit: written after it.
    """

    value: float
    source: str
    form: Form = Form.PLAIN
    derive: Derive = Derive.NONE
    unit: str = ""

    def __html__(self) -> str:
        made = {Derive.SUM: "sum of ", Derive.COUNT: "number of "}.get(self.derive, "")
        text = shown(self.value, self.form) + (f" {self.unit}" if self.unit else "")
        return Markup(
            '<data class="figure" value="{}" data-source="{}" data-form="{}" data-derive="{}" title="{}">{}</data>'
        ).format(repr(self.value), self.source, self.form, self.derive, made + self.source, text)


@dataclass(frozen=True, slots=True)
class Badge:
    """A verdict, in words and a sign; colour only repeats it."""

    text: str

    def __html__(self) -> str:
        tone, sign = _TONES.get(self.text, ("bad", "!"))
        return Markup('<span class="badge {}"><span aria-hidden="true">{}</span> {}</span>').format(
            tone, sign, self.text
        )


@dataclass(frozen=True, slots=True)
class Digest:
    """A sha256, shortened; whole in its tooltip."""

    value: str

    def __html__(self) -> str:
        return Markup('<code class="digest" title="{}">{}</code>').format(self.value, self.value[:12])


@dataclass(frozen=True, slots=True)
class Quote:
    """Words taken from a file, whatever figures they hold, and where they stand."""

    text: str
    source: str

    def __html__(self) -> str:
        return Markup('<span data-quote="{}" title="{}">{}</span>').format(self.source, self.source, self.text)


_TONES = {
    "ACCEPT": ("good", "✓"),
    "PASSED": ("good", "✓"),
    "PROVED-WITHOUT-RUNNING": ("good", "✓"),
    "REGRESSION": ("warn", "▼"),
    "ANOMALOUS": ("bad", "✕"),
    "REJECT": ("bad", "✕"),
    "FAILED": ("bad", "✕"),
    "INFEASIBLE": ("off", "–"),
}
_EXACT = 2.0**53
_UNITS = ("B", "kB", "MB", "GB", "TB")


def number_of(value: Any) -> float | None:
    """A JSON value as a number; manifests write infinities and NaN as strings."""
    if isinstance(value, bool | int | float):
        return float(value)
    if isinstance(value, str) and value.lower().lstrip("-") in ("nan", "inf", "infinity"):
        return float(value)
    return None


def shown(value: float, form: Form) -> str:
    """The number as text, units included."""
    if not math.isfinite(value):
        return "not finite"
    if form is Form.PERCENT:
        percent = 100 * value
        return f"{percent:.2f} %" if not value or abs(percent) >= 0.01 else f"{percent:.1e} %"
    if form is Form.LOSS:
        return f"{value:.4f}"
    if form is Form.RATIO:
        return f"{value:.3f}"
    if form is Form.BYTES:
        return _bytes(value)
    if form is Form.SECONDS:
        return f"{value:.1f} s" if value < 60 else f"{int(value // 60)} min {value % 60:.0f} s"
    if value == int(value) and abs(value) < _EXACT:
        return f"{int(value):,}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def _bytes(value: float) -> str:
    scaled, unit = value, _UNITS[0]
    for unit in _UNITS:
        if abs(scaled) < 999.5 or unit == _UNITS[-1]:
            break
        scaled /= 1000
    return f"{scaled:.0f} {unit}" if unit == "B" else f"{scaled:.3g} {unit}"
