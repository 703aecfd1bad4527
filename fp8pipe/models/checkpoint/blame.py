"""Decides which error class an unusable file raises, so that every command exits with the same code for it.

A file inside an artifact was written by this tool, so the artifact is damaged. Any other file is the user's input.
"""

from __future__ import annotations

from pathlib import Path

from fp8pipe.artifact import CHECKSUM_NAME, MANIFEST_NAME
from fp8pipe.core.errors import BadArtifactError, ConfigurationError


def unusable(path: Path, what: str, *, why: str = "", fix: str = "") -> BadArtifactError | ConfigurationError:
    """The error to raise for a file or directory: BadArtifactError inside an artifact, else ConfigurationError."""
    root = path if path.is_dir() else path.parent
    ours = root.suffix == ".partial" or any((root / name).is_file() for name in (MANIFEST_NAME, CHECKSUM_NAME))
    return (BadArtifactError if ours else ConfigurationError)(what, why=why, fix=fix)
