"""Work that several processes share: numbered items, each of which any of them can compute with the same result.

Rank 0 runs the command. The others load the same inputs, and then compute items until rank 0 has finished. Items are
handed out one by one, so that a faster process computes more of them. Every process sends a heartbeat once a second.
Rank 0 computes the items of a process that has sent none for `HEARTBEAT_TIMEOUT_S` itself. Where rank 0 sends none, the
others end with an error, and so does a process that is cut off from the store: see `silence`. So a lost process costs
time, but no results, and none waits for ever. (A process that fails tells the others, and all end: see `launch`.) The
store keeps no result once rank 0 has it.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol, Self

from fp8pipe.core.errors import first_line
from fp8pipe.core.launch import RankContext, within
from fp8pipe.core.rank_store import Heartbeats, KeyStore, delete_bytes, get_bytes, put_bytes, with_prefix
from fp8pipe.core.silence import SilenceWatch

__all__ = ["HEARTBEAT_TIMEOUT_S", "Item", "Job", "LocalPool", "StorePool", "WorkPool", "assist"]

_LOG = logging.getLogger(__name__)
HEARTBEAT_TIMEOUT_S: Final = 45.0  # of a rank above 0, without a heartbeat: then it is taken for lost
_PREFIX: Final = "fp8pipe/work"
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


class LocalPool:
    """The pool of a single process."""

    def results(self, job: Job, item: Item) -> Iterator[tuple[int, bytes]]:
        """Number and result of each item, in order."""
        for number in range(job.count):
            yield number, item(number)


class StorePool:
    """The pool of rank 0, which shares its work through a store of torch.distributed; a context manager.

    Args:
        place: the place of this process, whose store all ranks have opened.
    """

    def __init__(self, place: RankContext) -> None:
        self._place, self._store = place, with_prefix(_PREFIX, place.store)
        self._heartbeats = Heartbeats(self._store, 0, range(place.size))
        self._watch = SilenceWatch(place, self._heartbeats, [0])
        self._jobs, self._waits_since = 0, 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            try:
                within(2 * _PARTING_S, self._part)
            except (RuntimeError, TimeoutError) as error:  # the store is lost or cut off, but all results are there
                why = first_line(error) if str(error) else f"their store has not answered for {2 * _PARTING_S:.0f} s"
                _LOG.warning("the other processes could not be told that the work is done: %s", why)
        self._heartbeats.stop()

    def _part(self) -> None:
        """Tell the others that there is no more work. This process may host the store: let them read that first."""
        self._store.set(_END, "")
        until = time.monotonic() + _PARTING_S
        while time.monotonic() < until and any(
            not self._store.check([f"gone/{rank}"]) and not self._is_silent(rank) for rank in range(1, self._place.size)
        ):
            time.sleep(_POLL_S)

    def results(self, job: Job, item: Item) -> Iterator[tuple[int, bytes]]:
        """Number and result of each item, in the order in which they are finished; see `WorkPool`."""
        with self._watch:  # the rest of the run does not need the store
            yield from self._results(job, item)

    def _results(self, job: Job, item: Item) -> Iterator[tuple[int, bytes]]:
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
        delete_bytes(self._store, f"{place}/payload")

    def _collect(self, place: str, open_items: set[int]) -> Iterator[tuple[int, bytes]]:
        """The results that other processes have stored since the last call."""
        for number in sorted(open_items):
            if self._store.check([f"{place}/done/{number}"]):
                open_items.discard(number)
                result = get_bytes(self._store, f"{place}/result/{number}")
                delete_bytes(self._store, f"{place}/result/{number}")  # all results would not fit into memory
                self._store.delete_key(f"{place}/done/{number}")
                yield number, result

    def _is_lost(self, place: str, number: int) -> bool:
        if not self._store.check([f"{place}/taken/{number}"]):  # lost between taking the item and saying so
            return time.monotonic() - self._waits_since > HEARTBEAT_TIMEOUT_S
        return self._is_silent(int(self._store.get(f"{place}/taken/{number}")))

    def _is_silent(self, rank: int) -> bool:
        return self._heartbeats.silent_s(rank) > HEARTBEAT_TIMEOUT_S


def assist(place: RankContext, load: Callable[[], Callable[[Job], Item]]) -> None:
    """Compute items for rank 0 until it has finished: what the other ranks do.

    The process ends, with an error, if rank 0 sends no heartbeat or the store does not answer.

    Args:
        place: the place of this process, whose store all ranks have opened.
        load: loads the inputs, and returns a function that prepares a job and returns one that computes its items.
    """
    store, needed = with_prefix(_PREFIX, place.store), (0, place.rank)
    with Heartbeats(store, place.rank, needed) as heartbeats, SilenceWatch(place, heartbeats, needed):
        begin = load()
        for number in itertools.count():
            if not _awaited(store, f"job/{number}"):
                break
            _compute(store, place.rank, f"job/{number}", begin)
        store.set(f"gone/{place.rank}", "")


def _awaited(store: KeyStore, place: str) -> bool:
    """Wait until there is a job at `place` (true) or rank 0 has ended (false)."""
    while not store.check([place]):
        if store.check([_END]):
            return False
        time.sleep(_POLL_S)
    return True


def _compute(store: KeyStore, rank: int, place: str, begin: Callable[[Job], Item]) -> None:
    described = json.loads(store.get(place))
    item: Item | None = None
    while (number := store.add(f"{place}/next", 1) - 1) < described["count"]:
        store.set(f"{place}/taken/{number}", str(rank))
        if item is None:
            if not store.check([f"{place}/payload"]):  # this process was taken for lost, and the job is finished
                return
            item = begin(Job(described["name"], described["count"], get_bytes(store, f"{place}/payload")))
        put_bytes(store, f"{place}/result/{number}", item(number))
        store.set(f"{place}/done/{number}", "")
