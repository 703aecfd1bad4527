"""The record of a session: one JSON file, whole after every row, whatever becomes of the process that wrote it."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from fp8pipe.core.errors import BadArtifactError

SCHEMA: Final = 1
Row = dict[str, Any]


class Record:
    """A session's rows by part, and the file they are in.

    Args:
        path: of the file.
        data: what it holds.
    """

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path, self.data = path, data

    @classmethod
    def begin(cls, path: Path, options: dict[str, Any]) -> Record:
        """A new record of a session with these options, written at once: a place that cannot be written shows now."""
        told = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
        began = datetime.now(UTC).isoformat(timespec="seconds")
        record = cls(path, {"schema": SCHEMA, "began": began, "options": told, "parts": {}})
        record.write()
        return record

    @classmethod
    def read(cls, path: Path) -> Record:
        """The record in a file.

        Raises:
            BadArtifactError: there is none, or it is no record of this schema.
        """
        fix = "name a file that scripts/gpu_session.py wrote"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise BadArtifactError(f"{path} cannot be read", why=str(error), fix=fix) from error
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise BadArtifactError(
                f"{path} is not a record of scripts/gpu_session.py", why=f"its schema is not {SCHEMA}", fix=fix
            )
        return cls(path, data)

    def part(self, name: str, **facts: Any) -> None:
        """Begin a part, or add facts about it."""
        self.data["parts"].setdefault(name, {"rows": []}).update(facts)
        self.write()

    def row(self, part: str, row: Row) -> None:
        """Add a row to a part."""
        self.data["parts"][part]["rows"].append(row)
        self.write()

    def write(self) -> None:
        """Replace the file by the present state."""
        scratch = self.path.with_name(f"{self.path.name}.writing")
        scratch.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        scratch.replace(self.path)
