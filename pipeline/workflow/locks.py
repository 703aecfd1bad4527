"""Locks on the directory of a run, for all processes that write there, on any machine that shares the directory.

A run holds the directory alone. Jobs that run one stage each share the directory; each of them holds its stage alone,
and shares the stages that it reads. The record, which they all write, is locked while it is read, changed and written.
"""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from fp8pipe.core.errors import ConfigurationError, MissingCapabilityError
from pipeline.workflow.state import STAGES

__all__ = ["locked_record", "locked_run"]

_POLL_S: Final = 0.05
# A new run waits this long for a lock, as the processes of a killed run keep it until they have ended.
_LOCK_S: Final = 15.0
# A job on a cluster waits longer. Where it replaces one that was ended, that one may take 90 s to end; where a node was
# lost, an NFS server keeps its locks for a lease, of usually 90 s.
_JOB_LOCK_S: Final = 240.0


@contextlib.contextmanager
def locked_run(
    directory: Path, *, shared: bool = False, stage: str | None = None, reads: Sequence[str] = (),
    tell: Callable[[str], None] = lambda line: None,
) -> Iterator[tuple[int, ...]]:  # fmt: skip
    """A context that holds the lock of a run.

    Args:
        directory: directory of the run.
        shared: whether jobs that run one stage each may use the directory at the same time.
        stage: a stage to hold, too; it is not shared.
        reads: stages that nobody may write meanwhile; they are shared with other readers.
        tell: called with a line for the user if the locks are not free at once.

    Returns:
        The file descriptors of the locks. A lock lasts until all processes that inherit its descriptor have ended.

    Raises:
        ConfigurationError: another process holds a lock.
        MissingCapabilityError: the file system of the directory has no locks.
    """
    folder = directory / STAGES
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [(folder / ".lock", fcntl.LOCK_SH if shared else fcntl.LOCK_EX, str(directory))]
    held = [(name, fcntl.LOCK_SH) for name in reads] + ([] if stage is None else [(stage, fcntl.LOCK_EX)])
    wanted += [(folder / f"{name}.lock", mode, f"the stage {name} in {directory}") for name, mode in held]
    with contextlib.ExitStack() as stack:
        descriptors = []
        for path, mode, what in wanted:
            # NFS takes shared locks only on files that are open for reading, and others only for writing.
            descriptors.append(stack.enter_context(path.open("a+")).fileno())
            _wait(descriptors[-1], mode, what, _JOB_LOCK_S if shared else _LOCK_S, tell)
        yield tuple(descriptors)


@contextlib.contextmanager
def locked_record(directory: Path) -> Iterator[None]:
    """A context in which no other process writes the run's record; held only for moments, so it waits for ever."""
    with (directory / STAGES / ".record").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _wait(descriptor: int, mode: int, what: str, seconds: float, tell: Callable[[str], None]) -> None:
    if _try_lock(descriptor, mode):
        return
    tell(f"{what} is in use by another run: waiting for up to {seconds:.0f} s")
    deadline = time.monotonic() + seconds
    while not _try_lock(descriptor, mode):
        if time.monotonic() > deadline:
            raise ConfigurationError(
                f"{what} is being written by another run", why="its lock is held",
                fix="wait for it, or name another directory with --output",
            )  # fmt: skip
        time.sleep(_POLL_S)


def _try_lock(descriptor: int, mode: int) -> bool:
    try:
        fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise MissingCapabilityError(
            "the directory of the run cannot be locked", why=f"the file system refuses locks: {error}",
            fix="name a directory with --output on a file system that has them, and is mounted with them "
            "(NFS: without nolock; Lustre: with flock)",
        ) from error  # fmt: skip
    return True
