"""Reading figures: every value that a report shows is looked up here, in a file, at a path that is kept with it.

A place is written `FILE#/a/b/0`: a file relative to the report's subject, and a JSON pointer (RFC 6901) inside. In
`.jsonl` files the first part counts lines from 0. `*` stands for every element.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fp8pipe.artifact import MANIFEST_NAME, Manifest
from fp8pipe.core.errors import BadArtifactError
from fp8pipe.report.figures import Derive, Figure, Form, Quote, number_of

__all__ = ["Documents", "Part"]

Part = str | int
_MISSING = object()


class Documents:
    """The JSON files below a directory, each read once.

    Args:
        root: what file names are relative to.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._read: dict[str, Any] = {}

    def get(self, file: str, *parts: Part) -> Any:
        """What stands at a place; None where the file or the place is not there."""
        found = _walk(self._document(file), parts)
        return None if found is _MISSING else found

    def figure(self, file: str, *parts: Part, form: Form = Form.PLAIN) -> Figure | None:
        """The number at a place; None where there is none."""
        value = number_of(self.get(file, *parts))
        return None if value is None else Figure(value, source(file, parts), form)

    def quote(self, file: str, *parts: Part) -> Quote | None:
        """The words at a place; None where there are none."""
        text = self.get(file, *parts)
        return Quote(str(text), source(file, parts)) if text else None

    def quotes(self, file: str, *parts: Part) -> list[Quote]:
        """The items of a list of words, each with its place; none where there is no such list."""
        listed = self.get(file, *parts) or []
        return [Quote(str(text), source(file, (*parts, index))) for index, text in enumerate(listed)]

    def derived(self, how: Derive, file: str, *parts: Part, form: Form = Form.COUNT) -> Figure | None:
        """A number made of all values at a place; None where there are none."""
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
                if Path(file).name == MANIFEST_NAME:  # of any schema, under the names of today's
                    self._read[file] = Manifest.from_json(text, where=file).plain()
            except (OSError, ValueError, BadArtifactError):
                self._read[file] = _MISSING
        return self._read[file]


def source(file: str, parts: Sequence[Part]) -> str:
    """A place in words: `model/manifest.json#/details/rank`."""
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
