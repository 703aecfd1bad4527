"""Fields common to all validation records, and the last step of every validation."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

from pydantic import Field

from fp8pipe.artifact import Artifact
from fp8pipe.artifact.record import ExportRejectedError, write_record
from fp8pipe.core.config import FrozenConfig


class EngineRecord(FrozenConfig):
    """The common header of validation records. The manifest's digest shows whether the export has changed since."""

    # Since version 2, a checksum file is written next to the record.
    schema_version: int = Field(default=2, description="version of this schema")
    created: str = Field(description="UTC time, ISO 8601")
    export: str = Field(description="name of the export's directory")
    manifest_digest: str = Field(description="digest of the export's manifest when it was validated")
    engine: str = Field(description="the engine's name")


R = TypeVar("R", bound=EngineRecord)


def heading(artifact: Artifact) -> dict[str, Any]:
    """The header fields of a new record: the current time, and the export."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return {"created": created, "export": artifact.root.absolute().name, "manifest_digest": artifact.digest}


def concluded(record: R, artifact: Artifact, reasons: Sequence[str], rejection: str) -> R:
    """Write the record next to the export and return it.

    Args:
        record: the record.
        artifact: the export.
        reasons: why the export is rejected; empty if it is accepted.
        rejection: message of the error for a rejected export.

    Raises:
        ExportRejectedError: there are `reasons`; the record is attached to the error.
    """
    path = write_record(record, artifact.root)
    if reasons:
        fix = f"do not deploy this export; the results are in {path}"
        raise ExportRejectedError(rejection, why="; ".join(reasons), fix=fix, record=record)
    return record
