"""Numbers for display, each with its source; and verdicts, digests and quoted texts as table cells.

Every value in a report is looked up by `Documents` at a source written as `FILE#/a/b/0`: a file relative to the
directory of the report's subject, and a JSON pointer (RFC 6901) within that file. In `.jsonl` files, the first part of
the pointer is the line number, starting at 0. A part `*` selects every element of an object or array.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from markupsafe import Markup

from fp8pipe.artifact import MANIFEST_NAME, Manifest
from fp8pipe.artifact.gate import number_of
from fp8pipe.core.errors import BadArtifactError

__all__ = ["Badge", "Derive", "Digest", "Documents", "Figure", "Form", "Quote", "shown"]


class Form(StrEnum):
    """How a number is formatted."""

    PLAIN = "plain"
    COUNT = "count"
    LOSS = "loss"
    RATIO = "ratio"
    PERCENT = "percent"
    BYTES = "bytes"
    SECONDS = "seconds"


class Derive(StrEnum):
    """How several values are combined into one number."""

    NONE = ""
    SUM = "sum"
    COUNT = "count"


@dataclass(frozen=True, slots=True)
class Figure:
    """A number and its source."""

    value: float
    source: str  # `FILE#/json/pointer`, relative to the report's subject
    form: Form = Form.PLAIN
    derive: Derive = Derive.NONE  # how it was computed, if `source` refers to several values
    unit: str = ""

    def __html__(self) -> str:
        made = {Derive.SUM: "sum of ", Derive.COUNT: "number of "}.get(self.derive, "")
        text = shown(self.value, self.form) + (f" {self.unit}" if self.unit else "")
        return Markup(
            '<data class="figure" value="{}" data-source="{}" data-form="{}" data-derive="{}" title="{}">{}</data>'
        ).format(repr(self.value), self.source, self.form, self.derive, made + self.source, text)


@dataclass(frozen=True, slots=True)
class Badge:
    """A verdict as a word and a symbol, so that colour is not needed to read it."""

    text: str

    def __html__(self) -> str:
        tone, sign = _TONES.get(self.text, ("bad", "!"))
        return Markup('<span class="badge {}"><span aria-hidden="true">{}</span> {}</span>').format(
            tone, sign, self.text
        )


@dataclass(frozen=True, slots=True)
class Digest:
    """A sha256 digest, shortened; the tooltip shows it in full."""

    value: str

    def __html__(self) -> str:
        return Markup('<code class="digest" title="{}">{}</code>').format(self.value, self.value[:12])


@dataclass(frozen=True, slots=True)
class Quote:
    """Text copied from a file, and its source; numbers in the text need no source of their own."""

    text: str
    source: str

    def __html__(self) -> str:
        return Markup('<span data-quote="{}" title="{}">{}</span>').format(self.source, self.source, self.text)


_TONES = {
    **dict.fromkeys(("ACCEPT", "PASSED", "PROVED-WITHOUT-RUNNING"), ("good", "✓")),
    "REGRESSION": ("warn", "▼"),
    "NOT-VALIDATED": ("off", "–"),
    **dict.fromkeys(("ANOMALOUS", "REJECT", "FAILED"), ("bad", "✕")),
    "INFEASIBLE": ("off", "–"),
}
_EXACT = 2.0**53
_UNITS = ("B", "kB", "MB", "GB", "TB")


def shown(value: float, form: Form) -> str:
    """The number as text, including its unit."""
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


Part = str | int
_MISSING = object()


class Documents:
    """The JSON files under `root`, each read once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._read: dict[str, Any] = {}

    def get(self, file: str, *parts: Part) -> Any:
        """The value at a location; None if the file or the location does not exist."""
        found = _walk(self._document(file), parts)
        return None if found is _MISSING else found

    def figure(self, file: str, *parts: Part, form: Form = Form.PLAIN) -> Figure | None:
        """The number at a location; None if there is none."""
        value = number_of(self.get(file, *parts))
        return None if value is None else Figure(value, source(file, parts), form)

    def quote(self, file: str, *parts: Part) -> Quote | None:
        """The text at a location; None if there is none."""
        text = self.get(file, *parts)
        return Quote(str(text), source(file, parts)) if text else None

    def quotes(self, file: str, *parts: Part) -> list[Quote]:
        """The items of a list of strings, each with its source; empty if there is no such list."""
        listed = self.get(file, *parts) or []
        return [Quote(str(text), source(file, (*parts, index))) for index, text in enumerate(listed)]

    def derived(self, how: Derive, file: str, *parts: Part, form: Form = Form.COUNT) -> Figure | None:
        """The number or the sum of the values at a location; None if the location does not exist, or a sum is empty."""
        found = self.get(file, *parts)
        if found is None or (how is Derive.SUM and not found):
            return None
        value = float(len(found)) if how is Derive.COUNT else float(sum(found))
        return Figure(value, source(file, parts), form, how)

    def _document(self, file: str) -> Any:
        if file not in self._read:
            try:
                text = (self.root / file).read_text(encoding="utf-8")
                lines = [line for line in text.splitlines() if line.strip()]
                self._read[file] = [json.loads(x) for x in lines] if file.endswith(".jsonl") else json.loads(text)
                if Path(file).name == MANIFEST_NAME:  # any schema version, converted to the current names
                    self._read[file] = Manifest.from_json(text, where=file).plain()
            except (OSError, ValueError, BadArtifactError):
                self._read[file] = _MISSING
        return self._read[file]


def source(file: str, parts: Sequence[Part]) -> str:
    """A source as text: `model/manifest.json#/details/rank`."""
    escaped = (str(part).replace("~", "~0").replace("/", "~1") for part in parts)
    return f"{file}#" + "".join(f"/{part}" for part in escaped)


def _walk(here: Any, parts: Sequence[Part]) -> Any:
    for index, part in enumerate(parts):
        if part == "*":
            items = here.values() if isinstance(here, dict) else here if isinstance(here, list) else ()
            found = [_walk(item, parts[index + 1 :]) for item in items]
            return [item for item in found if item is not _MISSING]
        if isinstance(here, dict) and str(part) in here:
            here = here[str(part)]
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            here = here[part]
        else:
            return _MISSING
    return here
