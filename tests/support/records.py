"""Records of validations and measurements as commands write them, for tests that need one without an engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fp8pipe.artifact import Gate, open_artifact, write_checked
from fp8pipe.artifact.record import record_path

__all__ = ["sound_record", "write_sound_record"]


def sound_record(digest: str, /, **changes: Any) -> dict[str, Any]:
    """A record that says ACCEPT, with what every record holds."""
    gate = Gate(name="elements differing", value=0).model_dump(mode="json")
    return {
        "schema_version": 3, "manifest_digest": digest, "versions": {"engine": "1.0"}, "gates": [gate], "reasons": [],
        "verdict": "ACCEPT", **changes,
    }  # fmt: skip


def write_sound_record(export: Path, /, **changes: Any) -> Path:
    """Write one beside an export, with its checksum."""
    record = sound_record(open_artifact(export, verify=False, caches="engines").digest, **changes)
    return write_checked(record_path(export), json.dumps(record))
