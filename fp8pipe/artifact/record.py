"""JSON records beside what they speak of, each with its checksum: a small file that holds the digest of its bytes.

A manifest covers every other file of an artifact, and a checksum covers the manifest and the records beside artifacts.
It is `sha256sum -c` input, so that any machine can check it without fp8pipe, and guards against damage, not against
forgery: who can write the record can write its checksum. A validation leaves its record beside the export and not
inside, so that the hashes in the export's manifest stay true.
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

# The HTTP header in which every service names the digest of the artifact that it serves.
DIGEST_HEADER = "x-fp8pipe-artifact"
# And what is proved of it: ACCEPT, or `unvalidated`.
VERDICT_HEADER = "x-fp8pipe-verdict"
CHECKSUM_SUFFIX = ".sha256"
R = TypeVar("R", bound=BaseModel)


def checksum_path(path: Path) -> Path:
    """`NAME.sha256` beside `NAME.json`."""
    return path.with_suffix(CHECKSUM_SUFFIX)


def write_checked(path: Path, text: str) -> Path:
    """Write `text` (UTF-8) to `path`, and its checksum beside it.

    The new checksum waits under `NAME.sha256.partial` while the record is replaced, and a reader accepts a record that
    fits either. So a reader, and a run after a crash, sees the old record or the new one, whole and checksummed.
    """
    data = text.encode()
    record, checksum = _pending(path), _pending(checksum_path(path))
    _write(record, data)
    _write(checksum, _checksum_of(path, data))
    os.replace(record, path)
    os.replace(checksum, checksum_path(path))
    return path


def check_checksum(path: Path) -> str:
    """What is wrong with a checksummed file or its checksum, in words; empty when nothing is."""
    try:
        return _read(path)[1]
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"


def read_checked(path: Path, former: str = "") -> bytes:
    """The bytes of a checksummed file, which are those that its checksum speaks of.

    Args:
        path: the file.
        former: another name that its checksum may give it: one it had before it was copied.

    Raises:
        OSError: the file is not there, or cannot be read.
        BadArtifactError: it has no checksum, or another one.
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
    """Remove a record with its checksum, and what a crash may have left of either."""
    for name in (path, checksum_path(path)):
        name.unlink(missing_ok=True)
        _pending(name).unlink(missing_ok=True)


def _read(path: Path, former: str = "") -> tuple[bytes, str]:
    """Bytes of the record and the finding; looks twice, since a writer may have replaced both in between."""
    for _ in range(2):
        data = path.read_bytes()
        expected = _checksum_of(path, data)
        found = [_bytes(place) for place in (checksum_path(path), _pending(checksum_path(path)))]
        if expected in found or (former and _checksum_of(path.with_name(former), data) in found):
            return data, ""
    name = checksum_path(path).name
    if found[0] is None:
        return data, f"{path.name} has no checksum: {name} is missing"
    # What the checksum holds may be damaged, so it is quoted as Python would, and cut.
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
