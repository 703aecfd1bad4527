"""The key-value store that the processes of a launcher share: values of any size, and signs of life."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable
from typing import Final, Protocol, Self

__all__ = ["Beats", "KeyStore", "get_bytes", "put_bytes"]

_BEAT_S: Final = 1.0
_PART: Final = 4 << 20  # bytes of a value; the store refuses values of more than 8 MiB


class KeyStore(Protocol):
    """What is used of torch.distributed's stores, which have no complete type annotations."""

    def set(self, key: str, value: str | bytes) -> None:
        """Store a value."""

    def get(self, key: str) -> bytes:
        """Wait for a value and return it."""

    def check(self, keys: list[str]) -> bool:
        """Whether all keys have values."""

    def add(self, key: str, amount: int) -> int:
        """Add to a counter, and return its new value."""

    def clone(self) -> Self:
        """The same store through another connection."""


def put_bytes(store: KeyStore, key: str, value: bytes) -> None:
    """Store a value of any size under keys that begin with `key`, for `get_bytes`."""
    starts = range(0, len(value), _PART)
    for number, start in enumerate(starts):
        store.set(f"{key}/{number}", value[start : start + _PART])
    store.set(key, str(len(starts)))


def get_bytes(store: KeyStore, key: str) -> bytes:
    """A value that `put_bytes` stored; waits until it is there."""
    return b"".join(store.get(f"{key}/{number}") for number in range(int(store.get(key))))


class Beats:
    """Gives a sign of life once a second, and observes those of other ranks, in a thread of its own.

    Args:
        store: the store; this object uses a connection of its own.
        rank: this process.
        others: the ranks to observe.
        silence_s: for how long a rank may give no sign of life, in seconds.
    """

    def __init__(self, store: KeyStore, rank: int, others: Iterable[int], silence_s: float) -> None:
        self._store, self._rank, self._silence_s = store.clone(), rank, silence_s
        self._seen = {other: (b"", time.monotonic()) for other in others}
        self._ended = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def is_silent(self, rank: int) -> bool:
        """Whether a rank has given no sign of life for too long, or none can be received."""
        return time.monotonic() - self._seen[rank][1] > self._silence_s

    def stop(self) -> None:
        """End the thread; does not wait for it."""
        self._ended.set()

    def _run(self) -> None:
        for beat in itertools.count():
            try:
                self._store.set(f"beat/{self._rank}", str(beat))
                for other, (last, _) in self._seen.items():
                    if self._store.check([f"beat/{other}"]) and (found := self._store.get(f"beat/{other}")) != last:
                        self._seen[other] = (found, time.monotonic())
            except RuntimeError:
                return  # the connection is lost; from now on every other rank falls silent
            if self._ended.wait(_BEAT_S):
                return
