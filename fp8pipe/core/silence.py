"""Ends a process of several that hears no more from those it needs, or from the store in which they meet.

A network that is cut resets no connection. A collective operation then waits until its own timeout, and an operation of
the store, timeout or not, until TCP gives up after a quarter of an hour. So every process sends a heartbeat to the
store once a second, from a thread, and observes its own and that of rank 0, who observes all if it needs all: if every
process observed every other one, the store would have to answer the square of their number once a second. Another
thread, which calls nothing that can wait for the network, counts for how long none has come: it prints the error and
ends the process, as no call that waits in the main thread could be made to return.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Final, Self

from fp8pipe.core.errors import InterruptedRunError
from fp8pipe.core.launch import (
    GRACE_S,
    MEETING,
    RankContext,
    leave_after_printing,
    print_error,
    tell_of_failure,
    within,
)
from fp8pipe.core.rank_store import Heartbeats

__all__ = ["SILENCE_S", "SilenceWatch"]

# TCP sends again after pauses that double, from 0.2 s: at 25 s and at 51 s, so an interruption of half a minute is over
# in time. Longer than code in C keeps the interpreter's lock, without which no thread can send a heartbeat.
SILENCE_S: Final = 60.0
_TICK_S: Final = 1.0
_FIX: Final = (
    "check that the machines are up, and the network between them; then start the processes again: --resume continues "
    "from the last checkpoint"
)


class SilenceWatch:
    """A context in which this process ends if it, or another one, is cut off; it may be entered again.

    Args:
        place: the place of this process.
        heartbeats: those of this process, which also observe `needed`; they go on after the context.
        needed: the ranks without which this one cannot go on, itself included.

    Attributes:
        hosts: names of the ranks' machines for the message; may be set later.
    """

    def __init__(self, place: RankContext, heartbeats: Heartbeats, needed: Iterable[int]) -> None:
        self.hosts: Sequence[str] = ()
        self._place = replace(place, store=place.store.clone())  # the main thread may be waiting in the other one
        self._heartbeats, self._needed = heartbeats, tuple(needed)

    def __enter__(self) -> Self:
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        if silent := self._silent():
            self._end(silent)

    def _silent(self) -> list[int]:
        """The ranks that send no more heartbeats, once there are any; none if the context ends before."""
        # Ticks of this thread, not the clock: after a pause of this process, the other threads need time as well.
        ticks = dict.fromkeys(self._needed, 0)
        before = dict.fromkeys(ticks, b"")
        while not self._over.wait(_TICK_S):
            for rank in ticks:
                heartbeat = self._heartbeats.last(rank)
                ticks[rank] = ticks[rank] + 1 if heartbeat == before[rank] else 0
                before[rank] = heartbeat
            limits = {rank: self._limit(rank) for rank in ticks}
            if any(ticks[rank] * _TICK_S >= limits[rank] for rank in ticks):
                return [rank for rank in ticks if ticks[rank] * _TICK_S > limits[rank] / 2]
        return []

    def _limit(self, rank: int) -> float:
        """For how long a rank may send no heartbeat now, in seconds."""
        if self._heartbeats.broken:
            return GRACE_S if rank == self._place.rank else math.inf
        return self._longest(rank)

    def _longest(self, rank: int) -> float:
        """For how long a rank may send no heartbeat after its last one, or before its first, in seconds."""
        return SILENCE_S if self._heartbeats.last(rank) else MEETING.total_seconds()  # it may be importing modules

    def _end(self, silent: list[int]) -> None:
        place = self._place
        cut_off = place.rank in silent
        error = self._cut_off() if cut_off else self._lost(silent)
        first, code = (True, error.exit_code) if cut_off else tell_of_failure(place, error.exit_code)
        with contextlib.suppress(Exception):  # its output may be closed, or full
            if first:
                within(GRACE_S, lambda: print_error(place, error))
        with contextlib.suppress(Exception):
            within(2 * GRACE_S, lambda: leave_after_printing(place.store, code, first))
        os._exit(code)

    def _cut_off(self) -> InterruptedRunError:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        if self._heartbeats.broken:
            return InterruptedRunError(
                "the other processes of this run are gone",
                why=f"the store in which they meet, at {address}, has closed the connection: its launcher has ended",
                fix="see the messages of that launcher; --resume continues from the last checkpoint",
            )
        return InterruptedRunError(
            f"this process has been cut off from the others of this run for {self._longest(self._place.rank):.0f} s",
            why=f"the store in which they meet, at {address}, does not answer",
            fix=_FIX,
        )

    def _lost(self, silent: list[int]) -> InterruptedRunError:
        named = [f"rank {rank}" + (f" on {self.hosts[rank]}" if self.hosts else "") for rank in silent]
        longest = min(map(self._longest, silent))
        return InterruptedRunError(
            f"{', '.join(named)} of this run: no heartbeat for {longest:.0f} s",
            why="the processes were stopped, or their machines or the network failed: none of them ended with an error",
            fix=_FIX,
        )
