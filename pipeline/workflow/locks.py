"""Locks on the directory of a run, for all processes that write there, on any machine that shares the directory.

A run holds the directory alone. Jobs that run one stage each share the directory, and each of them holds its stage. The
record, which they all write, is locked while it is read, changed and written.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from fp8pipe.core.errors import ConfigurationError
from pipeline.workflow.state import STAGES

__all__ = ["locked_record", "locked_run"]

_POLL_S: Final = 0.05
# A new run waits this long for a lock, as the processes of a killed run keep it until they have ended.
_LOCK_S: Final = 15.0


@contextlib.contextmanager
def locked_run(directory: Path, *, shared: bool = False, stage: str | None = None) -> Iterator[tuple[int, ...]]:
    """A context that holds the lock of a run.

    Args:
        directory: directory of the run.
        shared: whether jobs that run one stage each may use the directory at the same time.
        stage: a stage to hold, too; it is not shared.

    Returns:
        The file descriptors of the locks. A lock lasts until all processes that inherit its descriptor have ended.

    Raises:
        ConfigurationError: another process holds a lock.
    """
    folder = directory / STAGES
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [(folder / ".lock", fcntl.LOCK_SH if shared else fcntl.LOCK_EX, str(directory))]
    if stage is not None:
        wanted.append((folder / f"{stage}.lock", fcntl.LOCK_EX, f"the stage {stage} in {directory}"))
    with contextlib.ExitStack() as stack:
        descriptors = []
        for path, mode, what in wanted:
            descriptors.append(stack.enter_context(path.open("w")).fileno())
            _wait(descriptors[-1], mode, what)
        yield tuple(descriptors)


@contextlib.contextmanager
def locked_record(directory: Path) -> Iterator[None]:
    """A context in which no other process writes the run's record; held only for moments, so it waits for ever."""
    with (directory / STAGES / ".record").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _wait(descriptor: int, mode: int, what: str) -> None:
    deadline = time.monotonic() + _LOCK_S
    while not _try_lock(descriptor, mode):
        if time.monotonic() > deadline:
            raise ConfigurationError(
                f"{what} is being written by another run", why="its lock is held",
                fix="wait for it, or name another directory with --output",
            )  # fmt: skip
        time.sleep(_POLL_S)


def _try_lock(descriptor: int, mode: int) -> bool:
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
        return True
    return False
