"""Clients that send one request after another, for tests of services of which parts are replaced meanwhile."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import httpx

from fp8pipe.artifact.record import DIGEST_HEADER

CLIENTS = 50


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        taken = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in taken]


@dataclass
class Clients:
    """Clients that send one request after another, and what they were answered."""

    url: str
    png: bytes
    answers: list[tuple[int, str]] = field(default_factory=list)  # status and digest of the artifact, in order
    ended: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        with httpx.Client(timeout=60) as client:
            while not self.ended.is_set():
                try:
                    found = client.post(self.url, content=self.png, headers={"Content-Type": "image/png"})
                    self.answers.append((found.status_code, found.headers.get(DIGEST_HEADER, "")))
                except httpx.HTTPError as error:
                    self.answers.append((0, f"{type(error).__name__}: {error}"))

    def wait(self, more: int, seconds: float = 120) -> list[tuple[int, str]]:
        """The next answers, at least `more`."""
        begun, until = len(self.answers), time.monotonic() + seconds
        while len(self.answers) < begun + more:
            assert time.monotonic() < until, Counter(self.answers)
            time.sleep(0.05)
        return self.answers[begun:]


@contextlib.contextmanager
def clients(url: str, png: bytes) -> Iterator[Clients]:
    found = Clients(url, png)
    threads = [threading.Thread(target=found.run) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        found.ended.set()
        for thread in threads:
            thread.join()
