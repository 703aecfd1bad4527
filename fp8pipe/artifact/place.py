"""Where an artifact may be written: what may be replaced or thrown away, and who is writing there."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fp8pipe.artifact.manifest import MANIFEST_NAME
from fp8pipe.artifact.reader import PARTIAL_SUFFIX
from fp8pipe.core.errors import ConfigurationError

__all__ = [
    "CHECKPOINT_PREFIX",
    "LOCK_NAME",
    "check_disposable",
    "check_output",
    "check_place",
    "lock",
    "partial_of",
    "translate_unwritable",
]

logger = logging.getLogger(__name__)

# An unfinished directory with an entry of this prefix can be resumed, and is not thrown away unasked.
CHECKPOINT_PREFIX = "checkpoint"
LOCK_NAME = ".lock"


def partial_of(output: Path) -> Path:
    """`OUTPUT.partial`, where an artifact is written until it is whole."""
    return output.with_name(output.name + PARTIAL_SUFFIX)


def check_place(output: Path | str, *, force: bool, resume: bool = False) -> None:
    """Refuse an output that `ArtifactWriter` would refuse; to be asked before anything costly begins.

    Raises:
        ConfigurationError: as `ArtifactWriter`.
    """
    output = Path(output).absolute()
    check_output(output, force)
    root = partial_of(output)
    if root.exists() and not resume:
        check_disposable(root, output, force)


def check_output(output: Path, force: bool) -> None:
    """Refuse an output that exists, unless `force` may replace it; `force` replaces artifacts only."""
    if not (output.exists() or output.is_symlink()):
        return
    if not force:
        raise ConfigurationError(
            f"{output} exists already",
            why="an artifact is never overwritten unasked",
            fix="give another output, or --force to replace it",
        )
    if not output.is_dir() or output.is_symlink() or (any(output.iterdir()) and not _is_artifact(output)):
        raise ConfigurationError(
            f"{output} is not an artifact, and is not replaced",
            why=f"it holds no {MANIFEST_NAME}" if output.is_dir() else "it is not a plain directory",
            fix="remove it yourself, or give another output",
        )


def _is_artifact(path: Path) -> bool:
    return (path / MANIFEST_NAME).is_file()


def check_disposable(root: Path, output: Path, force: bool) -> None:
    """Refuse to throw away an unfinished run that could be resumed."""
    if not root.is_dir():
        raise ConfigurationError(
            f"{root} is in the way", why="it is not a directory", fix="remove it, or give another output"
        )
    if not force and any(path.name.startswith(CHECKPOINT_PREFIX) for path in root.iterdir()):
        raise ConfigurationError(
            f"an unfinished run for {output} can be resumed",
            why=f"{root} holds a checkpoint",
            fix="--resume to continue it, or --force to throw it away",
        )


@contextmanager
def translate_unwritable(output: Path) -> Iterator[None]:
    """A place that cannot be written to is the user's choice of output (exit 10)."""
    try:
        yield
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise ConfigurationError(
            f"{output} cannot be written",
            why=f"{error.strerror}: {error.filename}",
            fix="give an output in a directory you may write to",
        ) from error


def lock(root: Path) -> IO[str]:
    """Hold `root` for this process; another process that tries is refused instead of mixing its files in."""
    stream = (root / LOCK_NAME).open("w")
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        stream.close()
        raise ConfigurationError(
            f"another process is writing {root}",
            why="it holds the directory's lock",
            fix="wait for it to end, or give another output",
        ) from error
    except OSError as error:
        logger.warning("%s cannot be locked against a second writer: %s", root, error.strerror)
    return stream
