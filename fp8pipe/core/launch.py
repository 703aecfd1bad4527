"""Whether this process is one of several that a launcher such as torchrun started, and what it owes the others.

The processes meet in the launcher's key-value store, before any of them computes. There, a process that fails says so,
and the first to do so is the only one that prints its error: the failures of the others are consequences, or the same
error again. They exit once it has printed, as a launcher terminates all processes when the first one exits. A process
whose error comes from a lost connection ends in the same way. A thread watches the store, so that a process that waits
for others, possibly inside a collective operation, ends as well.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import platform
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache
from typing import Any, Final, TypeVar

from fp8pipe.core.errors import ConfigurationError, Fp8PipeError, InterruptedRunError, first_line
from fp8pipe.core.progress import configure

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
_FAILED: Final = "fp8pipe/failed"
_PRINTED: Final = "fp8pipe/printed"  # set when the error of the first process that failed has been printed
_NUMBERS: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
_VARIABLES: Final = (*_NUMBERS, "MASTER_ADDR")
MEETING: Final = timedelta(minutes=5)  # in which all processes must have started
_WATCH_S: Final = 1.0
GRACE_S: Final = 10.0  # in which a process may end by itself after another has failed, and the store must answer
# What gloo and NCCL say when another process is gone; gloo raises plain RuntimeErrors.
_LOST: Final = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exiting")


@dataclass(frozen=True, slots=True)
class RankContext:
    """The place of this process among several.

    Attributes:
        rank: number of the process, from 0.
        size: number of processes.
        local: number of the process among those on its machine.
        store: the key-value store of the processes (`torch.distributed.Store`).
    """

    rank: int
    size: int
    local: int
    store: Any

    def fail(self, exit_code: int) -> bool:
        """Tell the others that this process has failed; returns whether it is the first to do so.

        It may tell so again, by which an exit code that is known better replaces the one before.
        """
        mine = f"{self.rank} {exit_code}"
        found = self.store.compare_set(_FAILED, "", mine).decode()
        if found.split()[0] == str(self.rank) and found != mine:
            found = self.store.compare_set(_FAILED, found, mine).decode()
        return bool(found == mine)

    def failed(self) -> tuple[int, int] | None:
        """Rank and exit code of the first process that has failed, if one has."""
        if not self.store.check([_FAILED]):
            return None
        rank, code = map(int, self.store.get(_FAILED).decode().split())
        return rank, code


@lru_cache(maxsize=1)
def launched() -> RankContext | None:
    """The place of this process among those that a launcher started; None if it runs alone.

    The first call meets the other processes, silences all but that of rank 0, and starts to watch for failures.

    Raises:
        ConfigurationError: the launcher's environment variables are incomplete or no numbers, or processes did not
            start in time.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    _check_variables()
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, size = next(rendezvous("env://", timeout=MEETING))
        watched = store.clone()
    except (RuntimeError, ValueError) as error:  # a ValueError is about a port
        raise ConfigurationError(
            f"the {os.environ['WORLD_SIZE']} processes of this run did not meet",
            why=first_line(error),
            fix="check that all were started, and that MASTER_ADDR and MASTER_PORT can be reached",
        ) from error
    place = RankContext(rank, size, int(os.environ["LOCAL_RANK"]), store)
    if rank:
        logging.disable(logging.WARNING)
        configure(quiet=True)
    _start_to_watch(place, watched)
    return place


def _check_variables() -> None:
    """Refuse an environment that no launcher would have made."""
    fix = "start with torchrun --nproc-per-node N -m fp8pipe ..., or unset WORLD_SIZE"
    if missing := [name for name in _VARIABLES if name not in os.environ]:
        raise ConfigurationError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but not all of the variables of a launcher are set",
            why=f"missing: {', '.join(missing)}",
            fix=fix,
        )
    if wrong := [f"{name}={os.environ[name]!r}" for name in _NUMBERS if not os.environ[name].isdecimal()]:
        raise ConfigurationError("a launcher's variables are no numbers", why=", ".join(wrong), fix=fix)


def report_failure(place: RankContext, error: BaseException, exit_code: int) -> tuple[BaseException | None, int]:
    """What this process has to do after `error`, of which the others are told.

    Args:
        place: the place of this process.
        error: what ended its work.
        exit_code: the exit code that belongs to `error`.

    Returns:
        The error to print; None if another process has printed one, or will. And the exit code, which is that of the
        printed error.
    """
    lost = _lost(error)
    first, exit_code = tell_of_failure(place, lost.exit_code if lost else exit_code)
    # Not by itself: the destructors of process groups wait for operations that will never complete.
    atexit.register(leave_after_printing, place.store, exit_code, first)
    _end_after(3 * GRACE_S, exit_code)
    if first:
        _introduce(place)
    return (lost or error) if first else None, exit_code


def tell_of_failure(place: RankContext, exit_code: int) -> tuple[bool, int]:
    """Tell the others that this process has failed.

    Returns:
        Whether this process has to print its error, and the exit code of the first that has failed.
    """
    try:
        return within(GRACE_S, lambda: (place.fail(exit_code), (place.failed() or (place.rank, exit_code))[1]))
    except TimeoutError:  # cut off: the others cannot know
        return True, exit_code
    except RuntimeError:  # the store is gone, and with it the launcher, which has told why
        return False, exit_code


def within(seconds: float, function: Callable[[], T]) -> T:
    """The result of a function that may wait for a network that is cut, for as long as TCP does.

    Raises:
        TimeoutError: it takes longer. It goes on in a thread.
    """
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(function())
        except BaseException as error:  # raised again in the caller
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result.result(seconds)


def print_errors_with(function: Callable[[Fp8PipeError], None]) -> None:
    """Set how an error is printed that ends this process from another thread than the main one."""
    _printers.append(function)


def print_error(place: RankContext, error: Fp8PipeError) -> None:
    """Print an error that ends this process, from another thread than the main one, which may be anywhere."""
    _introduce(place)
    _printers[-1](error)


def _introduce(place: RankContext) -> None:
    if place.rank:
        _LOG.error("rank %d of %d, on %s, failed:", place.rank, place.size, platform.node())


_printers: Final[list[Callable[[Fp8PipeError], None]]] = [lambda error: _LOG.error("%s", error)]


def _lost(error: BaseException) -> Fp8PipeError | None:
    """The error to report if `error` only says that another process is gone."""
    from torch.distributed import DistNetworkError

    if not isinstance(error, RuntimeError) or isinstance(error, Fp8PipeError):
        return None
    if not isinstance(error, DistNetworkError) and not any(word in str(error) for word in _LOST):
        return None
    return InterruptedRunError(
        "another process of this run ended unexpectedly",
        why=f"the connection to it broke: {first_line(error)}",
        fix="see the launcher's messages for the process that ended first; --resume continues from the last checkpoint",
    )


def _start_to_watch(place: RankContext, store: Any) -> None:
    """Watch for failures of other processes until this one exits, over a connection that nothing else waits for."""
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(replace(place, store=store), over), daemon=True)
    thread.start()

    def stop() -> None:  # a thread in torch's C++ code must not be there when the interpreter ends
        over.set()
        thread.join(_WATCH_S)

    atexit.register(stop)


def _watch(place: RankContext, over: threading.Event) -> None:
    """End this process if another one has failed and nothing else ends it."""
    while not over.wait(_WATCH_S):
        try:
            found = place.failed()
        except RuntimeError:  # the launcher is gone
            return
        if found is not None and found[0] != place.rank and not over.wait(GRACE_S):
            _leave(found[1])


def _end_after(seconds: float, exit_code: int) -> None:
    """End this process after some time, whatever it waits for: a network that is cut, or an output that is full."""
    timer = threading.Timer(seconds, os._exit, [exit_code])
    timer.daemon = True
    timer.start()


def leave_after_printing(store: Any, exit_code: int, first: bool) -> None:
    """End this process when the error of the first one that failed is printed; `first` says whether that is this one.

    A launcher terminates all processes when one exits, so one that exits earlier could lose the only message.
    """
    try:
        if first:
            _flush()
            store.set(_PRINTED, "")
        else:
            store.wait([_PRINTED], timedelta(seconds=GRACE_S))
    except RuntimeError:  # the store is gone, or the first process cannot print
        pass
    finally:  # after an interruption, too
        _leave(exit_code)


def _leave(exit_code: int) -> None:
    _flush()
    os._exit(exit_code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # it may be closed, or full, and must not keep this process alive
            stream.flush()
