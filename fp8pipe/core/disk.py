"""Disk space: asked for before writing, and a full disk reported as one (exit 15) with both numbers."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from fp8pipe.core.errors import OutOfMemoryError

__all__ = ["disk_guard", "free_bytes", "ordinary_mode", "translate_disk_full"]

_FULL = (errno.ENOSPC, errno.EDQUOT)
# safetensors writes from Rust and reports the system's text instead of raising OSError.
_FULL_TEXTS = ("No space left on device", "Disk quota exceeded")


def free_bytes(path: Path) -> int:
    """Bytes free to this user on the file system that holds `path`, which need not exist yet."""
    here = Path(path).absolute()
    while not here.exists():
        here = here.parent
    return shutil.disk_usage(here).free


def ordinary_mode(root: Path) -> int:
    """Permission bits of a file that is plainly created in `root`: 0666 less the umask."""
    scratch = root / ".mode"
    scratch.touch()  # asking for the umask itself would change it for a moment, for all threads
    try:
        return scratch.stat().st_mode & 0o777
    finally:
        scratch.unlink()


def disk_guard(path: Path, need_bytes: int) -> AbstractContextManager[None]:
    """Refuse now if `need_bytes` do not fit at `path`; as a context manager, also translate a full disk.

    Raises:
        OutOfMemoryError: less is free than is needed; the message holds both numbers.
    """
    free = free_bytes(path)
    if free < need_bytes:
        raise _full(path, need_bytes, free)
    return translate_disk_full(path, need_bytes)


@contextmanager
def translate_disk_full(path: Path, need_bytes: int | None = None) -> Iterator[None]:
    """Turn "no space left on device" raised inside into an OutOfMemoryError (exit 15).

    Args:
        path: what is being written.
        need_bytes: its expected size, where known.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise _full(path, need_bytes, free_bytes(path)) from error


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` says that a disk or a quota is full."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return type(error).__name__ == "SafetensorError" and any(text in str(error) for text in _FULL_TEXTS)


def _full(path: Path, need_bytes: int | None, free: int) -> OutOfMemoryError:
    need = "an unknown number of bytes" if need_bytes is None else f"{need_bytes} bytes"
    return OutOfMemoryError(
        f"the disk that holds {path} is full",
        why=f"needed {need}, {free} bytes are free",
        fix="free space, or give an output directory on another disk",
    )
