"""Work that several processes share: numbered items, each of which any of them can compute with the same result.

Rank 0 runs the command. The others load the same inputs, and then compute items until rank 0 has finished. Items are
handed out one by one, so that a faster process computes more of them. Every process gives a sign of life once a second.
Rank 0 computes the items of a process that has given none for `SILENCE_S` itself; where rank 0 gives none, the others
end with an error. So a lost process costs time, but no results, and none waits for ever. (A process that fails tells
the others, and all end: see `launch`.)
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol, Self

from fp8pipe.core.errors import Fp8PipeError, InterruptedRunError
from fp8pipe.core.rank_store import Beats, KeyStore, get_bytes, put_bytes

__all__ = [
    "SILENCE_S", "Alone", "Item", "Job", "StorePool", "WorkPool", "assist", "describe", "described_error",
]  # fmt: skip

_LOG = logging.getLogger(__name__)
SILENCE_S: Final = 45.0  # a process that has given no sign of life for this long is taken for lost
_PARTING_S: Final = 10.0
_POLL_S: Final = 0.05
_END: Final = "end"
Item = Callable[[int], bytes]


@dataclass(frozen=True, slots=True)
class Job:
    """A number of items of the same kind."""

    name: str  # tells a process what to compute
    count: int  # number of items
    payload: bytes  # what all items depend on beyond the inputs that each process has loaded by itself


class WorkPool(Protocol):
    """Computes the items of jobs."""

    def results(self, job: Job, item: Item) -> Iterator[tuple[int, bytes]]:
        """Number and result of each item, in the order in which they are finished.

        Args:
            job: what to compute.
            item: computes an item in this process.

        Raises:
            Fp8PipeError: an item failed, in any process.
        """


class Alone:
    """The pool of a single process."""

    def results(self, job: Job, item: Item) -> Iterator[tuple[int, bytes]]:
        """Number and result of each item, in order."""
        for number in range(job.count):
            yield number, item(number)


class StorePool:
    """The pool of rank 0, which shares its work through a store of torch.distributed; a context manager.

    Args:
        store: the store that all ranks have opened.
        size: number of ranks.
        silence_s: see `SILENCE_S`.
    """

    def __init__(self, store: KeyStore, size: int, silence_s: float = SILENCE_S) -> None:
        self._store, self._size, self._silence_s = store, size, silence_s
        self._beats = Beats(store, 0, range(1, size), silence_s)
        self._jobs, self._waits_since = 0, 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self._store.set(_END, "")
            until = time.monotonic() + _PARTING_S  # this process may host the store: let the others read the end first
            while time.monotonic() < until and any(
                not self._store.check([f"gone/{rank}"]) and not self._beats.is_silent(rank)
                for rank in range(1, self._size)
            ):
                time.sleep(_POLL_S)
        self._beats.stop()

    def results(self, job: Job, item: Item) -> Iterator[tuple[int, bytes]]:
        """Number and result of each item, in the order in which they are finished; see `WorkPool`."""
        place, self._jobs = f"job/{self._jobs}", self._jobs + 1
        put_bytes(self._store, f"{place}/payload", job.payload)
        self._store.set(place, json.dumps({"name": job.name, "count": job.count}))
        open_items = set(range(job.count))
        while (number := self._store.add(f"{place}/next", 1) - 1) < job.count:
            yield number, item(number)
            open_items.discard(number)
            yield from self._collect(place, open_items)
        self._waits_since = time.monotonic()
        while open_items:
            yield from self._collect(place, open_items)
            lost = next((number for number in sorted(open_items) if self._is_lost(place, number)), None)
            if lost is None:
                time.sleep(_POLL_S)
                continue
            _LOG.warning("the process that computed item %d of %s is lost; rank 0 computes it again", lost, job.name)
            yield lost, item(lost)
            open_items.discard(lost)

    def _collect(self, place: str, open_items: set[int]) -> Iterator[tuple[int, bytes]]:
        """The results that other processes have stored since the last call."""
        for number in sorted(open_items):
            if self._store.check([f"{place}/done/{number}"]):
                open_items.discard(number)
                yield number, get_bytes(self._store, f"{place}/result/{number}")

    def _is_lost(self, place: str, number: int) -> bool:
        if not self._store.check([f"{place}/taken/{number}"]):  # lost between taking the item and saying so
            return time.monotonic() - self._waits_since > self._silence_s
        return self._beats.is_silent(int(self._store.get(f"{place}/taken/{number}")))


def assist(store: KeyStore, rank: int, load: Callable[[], Callable[[Job], Item]], silence_s: float = SILENCE_S) -> None:
    """Compute items for rank 0 until it has finished: what the other ranks do.

    Args:
        store: the store that all ranks have opened.
        rank: this process.
        load: loads the inputs, and returns a function that prepares a job and returns one that computes its items.
        silence_s: see `SILENCE_S`.

    Raises:
        InterruptedRunError: rank 0 gives no sign of life.
    """
    beats = Beats(store, rank, [0], silence_s)
    try:
        begin = load()
        for number in itertools.count():
            if not _awaited(store, f"job/{number}", beats, silence_s):
                break
            _compute(store, rank, f"job/{number}", begin)
    finally:
        beats.stop()
    store.set(f"gone/{rank}", "")


def _awaited(store: KeyStore, place: str, beats: Beats, silence_s: float) -> bool:
    """Wait until there is a job at `place` (true) or rank 0 has ended (false)."""
    while not store.check([place]):
        if store.check([_END]):
            return False
        if beats.is_silent(0):
            raise InterruptedRunError(
                "rank 0 is lost",
                why=f"it has given no sign of life for {silence_s:.0f} s",
                fix="start all processes again, with --resume",
            )
        time.sleep(_POLL_S)
    return True


def _compute(store: KeyStore, rank: int, place: str, begin: Callable[[Job], Item]) -> None:
    described = json.loads(store.get(place))
    job = Job(described["name"], described["count"], get_bytes(store, f"{place}/payload"))
    item: Item | None = None
    while (number := store.add(f"{place}/next", 1) - 1) < job.count:
        store.set(f"{place}/taken/{number}", str(rank))
        item = item or begin(job)
        put_bytes(store, f"{place}/result/{number}", item(number))
        store.set(f"{place}/done/{number}", "")


def describe(error: Exception) -> str:
    """An error as JSON, for `described_error` in another process."""
    if isinstance(error, Fp8PipeError):
        return json.dumps([type(error).__name__, error.what, error.why, error.fix])
    return json.dumps(["", f"{type(error).__name__}: {error}", "", ""])


def described_error(described: str | bytes, where: str) -> Fp8PipeError:
    """The error that `describe` was given, of the same class if it is one of fp8pipe's; `where` names the process."""
    kind, what, why, fix = json.loads(described)
    kinds = {known.__name__: known for known in Fp8PipeError.__subclasses__()}
    return kinds.get(kind, Fp8PipeError)(f"{what} (on {where})", why=why, fix=fix)
