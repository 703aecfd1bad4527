"""Chooses the error class for a file that cannot be used, so that every command exits with the same code for it.

Files inside an artifact were written by fp8pipe, so a bad one means that the artifact is damaged. Any other file is the
user's input.
"""

from __future__ import annotations

from pathlib import Path

from fp8pipe.artifact import CHECKSUM_NAME, MANIFEST_NAME
from fp8pipe.core.errors import BadArtifactError, ConfigurationError


def unusable(path: Path, what: str, *, why: str = "", fix: str = "") -> BadArtifactError | ConfigurationError:
    """Create the error for a file or directory that cannot be used; the caller raises it.

    Args:
        path: the file or directory.
        what: the error message.
        why: the cause.
        fix: what the user can do.

    Returns:
        A `BadArtifactError` if the path is an artifact's directory or a file in one (also one that is still being
        written, `*.partial`), otherwise a `ConfigurationError`.
    """
    root = path if path.is_dir() else path.parent
    ours = root.suffix == ".partial" or any((root / name).is_file() for name in (MANIFEST_NAME, CHECKSUM_NAME))
    return (BadArtifactError if ours else ConfigurationError)(what, why=why, fix=fix)
