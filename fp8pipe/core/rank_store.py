"""The key-value store that the processes of a launcher share: values of any size, and heartbeats."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable
from typing import Any, Final, Protocol, Self

import torch.distributed

__all__ = ["Heartbeats", "KeyStore", "delete_bytes", "get_bytes", "put_bytes", "with_prefix"]

_HEARTBEAT_S: Final = 1.0
_JOIN_S: Final = 2.0
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

    def delete_key(self, key: str) -> bool:
        """Delete a value; returns whether there was one."""

    def clone(self) -> Self:
        """The same store through another connection."""


def with_prefix(prefix: str, store: KeyStore) -> KeyStore:
    """The part of a store whose keys begin with `prefix`, which others that use the store do not touch."""
    untyped: Any = torch.distributed
    part: KeyStore = untyped.PrefixStore(prefix, store)
    return part


def put_bytes(store: KeyStore, key: str, value: bytes) -> None:
    """Store a value of any size under keys that begin with `key`, for `get_bytes`."""
    starts = range(0, len(value), _PART)
    for number, start in enumerate(starts):
        store.set(f"{key}/{number}", value[start : start + _PART])
    store.set(key, str(len(starts)))


def get_bytes(store: KeyStore, key: str) -> bytes:
    """A value that `put_bytes` stored; waits until it is there."""
    return b"".join(store.get(f"{key}/{number}") for number in range(int(store.get(key))))


def delete_bytes(store: KeyStore, key: str) -> None:
    """Delete a value that `put_bytes` stored. A reader that finds no value at `key` waits."""
    parts = int(store.get(key))
    store.delete_key(key)
    for number in range(parts):
        store.delete_key(f"{key}/{number}")


class Heartbeats:
    """A context in which a thread sends a heartbeat once a second, and observes those of ranks.

    Args:
        store: the store; this object uses a connection of its own.
        rank: this process.
        observed: the ranks to observe; this one may be among them.
    """

    def __init__(self, store: KeyStore, rank: int, observed: Iterable[int]) -> None:
        self._store, self._rank = store.clone(), rank
        self._seen = {other: (b"", time.monotonic()) for other in observed}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def silent_s(self, rank: int) -> float:
        """For how long no heartbeat of a rank has been received, in seconds."""
        return time.monotonic() - self._seen[rank][1]

    def last(self, rank: int) -> bytes:
        """The last heartbeat of a rank, which differs from those before; empty if there has been none."""
        return self._seen[rank][0]

    @property
    def broken(self) -> bool:
        """Whether the connection to the store is broken, so that no heartbeat can follow."""
        return not self._thread.is_alive()

    def stop(self) -> None:
        """End the thread, and wait for it, but not for ever."""
        self._ended.set()
        self._thread.join(_JOIN_S)  # a thread in torch's C++ code must not be there when the interpreter ends

    def _run(self) -> None:
        for heartbeat in itertools.count():
            try:
                self._store.set(f"heartbeat/{self._rank}", str(heartbeat))
                for other, (last, _) in self._seen.items():
                    if (
                        self._store.check([f"heartbeat/{other}"])
                        and (found := self._store.get(f"heartbeat/{other}")) != last
                    ):
                        self._seen[other] = (found, time.monotonic())
            except RuntimeError:
                return  # the connection is lost; from now on every other rank falls silent
            if self._ended.wait(_HEARTBEAT_S):
                return
