"""The record of a GPU run: one JSON file, replaced atomically after every row, so that no finished row is lost."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from fp8pipe.core.errors import BadArtifactError

SCHEMA: Final = 1
Row = dict[str, Any]


class Record:
    """The rows of a GPU run by part, and the file that stores them.

    Args:
        path: path of the JSON file.
        data: contents of the file.
    """

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path, self.data = path, data

    @classmethod
    def begin(cls, path: Path, options: dict[str, Any]) -> Record:
        """Create a record with the command-line options; it is written now, so that an unwritable path fails early."""
        told = {name: str(value) if isinstance(value, Path) else value for name, value in options.items()}
        began = datetime.now(UTC).isoformat(timespec="seconds")
        record = cls(path, {"schema": SCHEMA, "began": began, "options": told, "parts": {}})
        record.write()
        return record

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read a record from its file.

        Raises:
            BadArtifactError: the file cannot be read, or is not a record of this schema version.
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
        """Start a part, or add `facts` to one that was started, and write the file."""
        self.data["parts"].setdefault(name, {"rows": []}).update(facts)
        self.write()

    def row(self, part: str, row: Row) -> None:
        """Add a row to a part, and write the file."""
        self.data["parts"][part]["rows"].append(row)
        self.write()

    def write(self) -> None:
        """Replace the file, atomically, with the current state."""
        scratch = self.path.with_name(f"{self.path.name}.writing")
        scratch.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        scratch.replace(self.path)
