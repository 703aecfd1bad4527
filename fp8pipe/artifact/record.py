"""JSON records with checksums: each record has a small file next to it that contains the sha256 of its bytes.

A manifest covers every other file of an artifact; checksum files cover manifests and the records next to artifacts.
A checksum file is in the format of `sha256sum -c`, so any machine can check it without fp8pipe. It protects against
damage, not forgery: whoever can write the record can also write its checksum. The record of a validation is written
next to the export, not into it, so that the export stays exactly as its manifest describes it.
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

# The HTTP header in which every service sends the digest of the artifact that it serves.
DIGEST_HEADER = "x-fp8pipe-artifact"
# The HTTP header with the artifact's verdict: ACCEPT, or `unvalidated`.
VERDICT_HEADER = "x-fp8pipe-verdict"
CHECKSUM_SUFFIX = ".sha256"
R = TypeVar("R", bound=BaseModel)


def checksum_path(path: Path) -> Path:
    """`NAME.sha256`, next to `NAME.json`."""
    return path.with_suffix(CHECKSUM_SUFFIX)


def write_checked(path: Path, text: str) -> Path:
    """Write `text` (UTF-8) to `path`, and its checksum next to it.

    The new checksum is kept in `NAME.sha256.partial` while the record is replaced, and a reader accepts a record that
    matches either checksum. So a reader, even after a crash, sees the complete old or new record with a valid checksum.
    """
    data = text.encode()
    record, checksum = _pending(path), _pending(checksum_path(path))
    _write(record, data)
    _write(checksum, _checksum_of(path, data))
    os.replace(record, path)
    os.replace(checksum, checksum_path(path))
    return path


def check_checksum(path: Path) -> str:
    """What is wrong with a checksummed file or its checksum, in words; empty if nothing is."""
    try:
        return _read(path)[1]
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"


def read_checked(path: Path, former: str = "") -> bytes:
    """The bytes of a checksummed file, after verifying its checksum.

    Args:
        path: the file.
        former: another file name that its checksum may contain, for instance the name before it was copied.

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
    """Remove a record and its checksum, and any partial files that a crash left of them."""
    for name in (path, checksum_path(path)):
        name.unlink(missing_ok=True)
        _pending(name).unlink(missing_ok=True)


def _read(path: Path, former: str = "") -> tuple[bytes, str]:
    """The record's bytes and what is wrong with them; reads twice, since a writer may replace the files meanwhile."""
    for _ in range(2):
        data = path.read_bytes()
        expected = _checksum_of(path, data)
        found = [_bytes(place) for place in (checksum_path(path), _pending(checksum_path(path)))]
        if expected in found or (former and _checksum_of(path.with_name(former), data) in found):
            return data, ""
    name = checksum_path(path).name
    if found[0] is None:
        return data, f"{path.name} has no checksum: {name} is missing"
    # The checksum file may be damaged, so its content is shown with repr() and truncated.
    return data, f"{path.name} has sha256 {expected[:64].decode()}, its checksum {name} holds {found[0][:64]!r}" + (
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
    """A validation ended with REJECT.

    Attributes:
        record: the record of the validation, which is also written next to the export.
    """

    def __init__(self, what: str, *, why: str, fix: str, record: R) -> None:
        super().__init__(what, why=why, fix=fix)
        self.record = record


def record_path(export: Path) -> Path:
    """`<export>.validation.json`, next to the export."""
    absolute = Path(os.path.abspath(export))
    return absolute.with_name(absolute.name + ".validation.json")


def remove_record(export: Path) -> None:
    """Remove an export's validation record with its checksum, so that no old verdict remains if validation fails."""
    remove_checked(record_path(export))


def write_record(record: BaseModel, export: Path, *, place: Path | None = None) -> Path:
    """Write the record with its checksum, so that a reader sees either the old file or the complete new one.

    Args:
        record: the record.
        export: the export's directory.
        place: where to write it; `<export>.validation.json` if None.

    Raises:
        OutOfMemoryError: the disk is full.
    """
    path = place or record_path(export)
    with translate_disk_full(path.parent):
        return write_checked(path, record.model_dump_json(indent=2) + "\n")
