"""Where every validation leaves its record: beside the export, checksummed, in one step.

Beside and not inside, so that the hashes in the export's manifest stay true.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel

from fp8pipe.artifact import remove_checked, translate_disk_full, write_checked
from fp8pipe.core.errors import GateFailedError

__all__ = ["DIGEST_HEADER", "ExportRejectedError", "record_path", "remove_record", "write_record"]

# The HTTP header in which every service names the digest of the artifact that it serves.
DIGEST_HEADER = "x-fp8pipe-artifact"

R = TypeVar("R", bound=BaseModel)


class ExportRejectedError(GateFailedError, Generic[R]):
    """A validation ended with REJECT.

    Attributes:
        record: what was found; it is written beside the export, too.
    """

    def __init__(self, what: str, *, why: str, fix: str, record: R) -> None:
        super().__init__(what, why=why, fix=fix)
        self.record = record


def record_path(export: Path) -> Path:
    """`<export>.validation.json`, beside the export."""
    absolute = Path(os.path.abspath(export))
    return absolute.with_name(absolute.name + ".validation.json")


def remove_record(export: Path) -> None:
    """Remove the record beside an export, with its checksum: an old verdict must not outlive a failure."""
    remove_checked(record_path(export))


def write_record(record: BaseModel, export: Path, *, place: Path | None = None) -> Path:
    """Write the record with its checksum: a reader sees the old file or the new one, whole.

    Args:
        record: what was found.
        export: the export's directory.
        place: where to write; `<export>.validation.json` when None.

    Raises:
        OutOfMemoryError: the disk is full.
    """
    path = place or record_path(export)
    with translate_disk_full(path.parent):
        return write_checked(path, record.model_dump_json(indent=2) + "\n")
