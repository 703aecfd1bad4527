"""JSON files with checksums: next to `NAME.json` there is a file `NAME.sha256` with the sha256 of its bytes.

Manifests, and the records that are stored next to artifacts, have such checksum files; all other files of an artifact
are covered by the manifest. Checksum files have the format of `sha256sum -c` and can thus be checked without fp8pipe.
They detect damage, but not forgery, because whoever can change a record can also change its checksum.

The record of a validation is written next to the export, not into it, so that the export stays as its manifest
describes it.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel

from fp8pipe.core.errors import BadArtifactError, GateFailedError
from fp8pipe.core.machine import translate_disk_full

__all__ = [
    "DIGEST_HEADER", "VERDICT_HEADER", "ExportRejectedError", "check_checksum", "checksum_path", "read_checked",
    "record_path", "remove_checked", "remove_record", "write_checked", "write_record",
]  # fmt: skip

# The HTTP header in which all servers send the digest of the artifact that they serve.
DIGEST_HEADER = "x-fp8pipe-artifact"
# The HTTP header in which servers send the verdict of the artifact: `ACCEPT` or `unvalidated`.
VERDICT_HEADER = "x-fp8pipe-verdict"
CHECKSUM_SUFFIX = ".sha256"
R = TypeVar("R", bound=BaseModel)


def checksum_path(path: Path) -> Path:
    """Path of the checksum file: `NAME.sha256` for `NAME.json`."""
    return path.with_suffix(CHECKSUM_SUFFIX)


def write_checked(path: Path, text: str) -> Path:
    """Write `text` (UTF-8) to `path`, and its checksum next to it; returns `path`.

    Readers see either the complete old file or the complete new one with a valid checksum, even after a crash: while
    the file is replaced, the new checksum is in `NAME.sha256.partial`, and readers accept a file that matches either of
    the two checksums.
    """
    data = text.encode()
    record, checksum = _pending(path), _pending(checksum_path(path))
    _write(record, data)
    _write(checksum, _checksum_of(path, data))
    os.replace(record, path)
    os.replace(checksum, checksum_path(path))
    return path


def check_checksum(path: Path, former: str = "") -> str:
    """Check a file against its checksum file; returns a message that describes the problem, empty if there is none.

    Args:
        path: the file.
        former: see `read_checked`.
    """
    try:
        return _read(path, former)[1]
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"


def read_checked(path: Path, former: str = "") -> bytes:
    """Read a file, and verify its checksum.

    Args:
        path: the file.
        former: another name of the file that its checksum file may contain, for instance that before it was copied.

    Raises:
        OSError: the file does not exist or cannot be read.
        BadArtifactError: the checksum is missing or does not match.
    """
    data, finding = _read(path, former)
    if finding:
        raise BadArtifactError(
            f"{path} is not what was written",
            why=finding,
            fix="copy it again from its source, with its checksum, or write it again",
        )
    return data


def remove_checked(path: Path) -> None:
    """Remove a file and its checksum file, and also temporary files that a crash may have left."""
    for name in (path, checksum_path(path)):
        name.unlink(missing_ok=True)
        _pending(name).unlink(missing_ok=True)


def _read(path: Path, former: str = "") -> tuple[bytes, str]:
    """Read a file, and compare it with its checksum; returns its bytes, and a message if they do not match.

    If they do not match, both files are read once more, because a writer may have replaced them in between.
    """
    for _ in range(2):
        data = path.read_bytes()
        expected = _checksum_of(path, data)
        found = [_bytes(place) for place in (checksum_path(path), _pending(checksum_path(path)))]
        if expected in found or (former and _checksum_of(path.with_name(former), data) in found):
            return data, ""
    name = checksum_path(path).name
    if found[0] is None:
        return data, f"{path.name} has no checksum: {name} is missing"
    held = found[0][:64].decode("ascii", "backslashreplace")  # a damaged file may hold anything
    return data, f"{path.name} has sha256 {expected[:64].decode()}, its checksum {name} holds {held}" + (
        "" if found[0][:64] != expected[:64] else ", and what follows the digest is not what was written"
    )


def _checksum_of(path: Path, data: bytes) -> bytes:
    return f"{hashlib.sha256(data).hexdigest()}  {path.name}\n".encode()


def _bytes(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _pending(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


class ExportRejectedError(GateFailedError, Generic[R]):
    """The error of a validation that ended with the verdict REJECT.

    Attributes:
        record: the record of the validation, which has also been written next to the export.
    """

    def __init__(self, what: str, *, why: str, fix: str, record: R) -> None:
        super().__init__(what, why=why, fix=fix)
        self.record = record


def record_path(export: Path) -> Path:
    """Path of an export's validation record: `<export>.validation.json`, next to the export."""
    absolute = Path(os.path.abspath(export))
    return absolute.with_name(absolute.name + ".validation.json")


def remove_record(export: Path) -> None:
    """Remove an export's validation record before a new validation, so that no old verdict remains if that fails."""
    remove_checked(record_path(export))


def write_record(record: BaseModel, export: Path, *, place: Path | None = None) -> Path:
    """Write a record with its checksum, see `write_checked`; returns its path.

    Args:
        record: the record.
        export: the export's directory.
        place: path of the record; `<export>.validation.json` if None.

    Raises:
        OutOfMemoryError: the disk is full.
    """
    path = place or record_path(export)
    with translate_disk_full(path.parent):
        return write_checked(path, record.model_dump_json(indent=2) + "\n")
