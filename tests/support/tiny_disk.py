"""A real file system of a few kB, on which a disk becomes full; needs the right to mount."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["tiny_disk_at"]


@contextmanager
def tiny_disk_at(mount: Path, size: str) -> Iterator[Path]:
    """The mounted directory, which is made; skips the test where this user may not mount.

    Args:
        mount: where it is mounted.
        size: for instance "256k".
    """
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mount)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("this user may not mount a file system")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)
