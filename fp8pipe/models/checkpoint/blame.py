"""Of which class the error of a file is that cannot be used: one answer for all commands, as scripts go by exit codes.

A file of an artifact was written by this tool, so the artifact is damaged; any other one is a model that the user gave.
"""

from __future__ import annotations

from pathlib import Path

from fp8pipe.artifact import CHECKSUM_NAME, MANIFEST_NAME
from fp8pipe.core.errors import BadArtifactError, ConfigurationError


def unusable(path: Path, what: str, *, why: str = "", fix: str = "") -> BadArtifactError | ConfigurationError:
    """The error to raise about a file or directory: BadArtifactError in an artifact, else ConfigurationError."""
    root = path if path.is_dir() else path.parent
    ours = root.suffix == ".partial" or any((root / name).is_file() for name in (MANIFEST_NAME, CHECKSUM_NAME))
    return (BadArtifactError if ours else ConfigurationError)(what, why=why, fix=fix)
