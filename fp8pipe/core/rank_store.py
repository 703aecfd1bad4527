"""The store of torch.distributed that ranks share: how it is opened, values of any size, and signs of life."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from typing import Final, Protocol, Self

from fp8pipe.core.errors import MissingCapabilityError
from fp8pipe.core.ranks import Ranks

__all__ = ["Beats", "KeyStore", "get_bytes", "open_store", "put_bytes"]

_BEAT_S: Final = 1.0
_PART: Final = 4 << 20  # bytes of a value; the store refuses values of more than 8 MiB
_PATIENCE: Final = timedelta(seconds=60)


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


def open_store(ranks: Ranks) -> KeyStore:
    """The store at `MASTER_ADDR` and `MASTER_PORT`, which torchrun or rank 0 hosts.

    Raises:
        MissingCapabilityError: the variables are not set, or the store cannot be reached within a minute.
    """
    from torch.distributed import rendezvous  # type: ignore[attr-defined]  # public, but not in __all__

    try:
        store, _, _ = next(iter(rendezvous("env://", ranks.rank, ranks.size, timeout=_PATIENCE)))
    except (ValueError, RuntimeError) as error:  # DistError is a RuntimeError
        raise MissingCapabilityError(
            f"rank {ranks.rank} cannot reach the other ranks",
            why=str(error).splitlines()[0],
            fix="start the command with torchrun; across machines, --rdzv-endpoint HOST:PORT must be reachable",
        ) from error
    store.set_timeout(_PATIENCE)
    found: KeyStore = store
    return found


def put_bytes(store: KeyStore, key: str, value: bytes) -> None:
    """Store a value of any size under keys that begin with `key`, for `get_bytes`."""
    starts = range(0, len(value), _PART)
    for number, start in enumerate(starts):
        store.set(f"{key}/{number}", value[start : start + _PART])
    store.set(key, str(len(starts)))


def get_bytes(store: KeyStore, key: str) -> bytes:
    """A value that `put_bytes` stored; waits for it, a minute at most."""
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
