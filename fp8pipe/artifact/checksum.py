"""Seals: a small file beside a JSON record that holds the digest of its bytes.

A manifest covers every other file of an artifact, and nothing in the artifact covered the manifest; the records beside
artifacts had no digest at all. A seal is `sha256sum -c` input, so that any machine can check it without fp8pipe. It
guards against damage, not against forgery: who can write the record can write its seal.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from fp8pipe.core.errors import BadArtifactError

__all__ = ["check_seal", "read_sealed", "remove_sealed", "seal_path", "write_sealed"]

SEAL_SUFFIX = ".sha256"


def seal_path(path: Path) -> Path:
    """`NAME.sha256` beside `NAME.json`."""
    return path.with_suffix(SEAL_SUFFIX)


def write_sealed(path: Path, text: str) -> Path:
    """Write `text` (UTF-8) to `path`, and its seal beside it.

    The new seal waits under `NAME.sha256.partial` while the record is replaced, and a reader accepts a record that
    fits either. So a reader, and a run after a crash, sees the old record or the new one, whole and sealed.
    """
    data = text.encode()
    record, seal = _pending(path), _pending(seal_path(path))
    _write(record, data)
    _write(seal, _seal_of(path, data))
    os.replace(record, path)
    os.replace(seal, seal_path(path))
    return path


def check_seal(path: Path) -> str:
    """What is wrong with a sealed file or its seal, in words; empty when nothing is."""
    try:
        return _read(path)[1]
    except OSError as error:
        return f"{path.name} cannot be read: {error.strerror}"


def read_sealed(path: Path) -> bytes:
    """The bytes of a sealed file, which are those that its seal speaks of.

    Raises:
        OSError: the file is not there, or cannot be read.
        BadArtifactError: it has no seal, or another one.
    """
    data, finding = _read(path)
    if finding:
        raise BadArtifactError(
            f"{path} is not what was written",
            why=finding,
            fix="copy it again from its source, with its seal, or write it again",
        )
    return data


def remove_sealed(path: Path) -> None:
    """Remove a record with its seal, and what a crash may have left of either."""
    for name in (path, seal_path(path)):
        name.unlink(missing_ok=True)
        _pending(name).unlink(missing_ok=True)


def _read(path: Path) -> tuple[bytes, str]:
    """Bytes of the record and the finding; looks twice, since a writer may have replaced both in between."""
    for _ in range(2):
        data = path.read_bytes()
        expected = _seal_of(path, data)
        found = [_bytes(place) for place in (seal_path(path), _pending(seal_path(path)))]
        if expected in found:
            return data, ""
    name = seal_path(path).name
    if found[0] is None:
        return data, f"{path.name} has no seal: {name} is missing"
    # What the seal holds may be damaged, so it is quoted as Python would, and cut.
    return data, f"{path.name} has sha256 {expected[:64].decode()}, its seal {name} holds {found[0][:64]!r}" + (
        "" if found[0][:64] != expected[:64] else ", and what follows the digest is not what was written"
    )


def _seal_of(path: Path, data: bytes) -> bytes:
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
