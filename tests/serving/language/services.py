"""Processes that serve, for tests: started, found by the line they print, and ended."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[3]


@dataclass
class Running:
    """A service."""

    process: subprocess.Popen[str]
    url: str = ""
    lines: list[str] = field(default_factory=list)

    def client(self, **headers: str) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, headers=headers)


def wait_until(question: Callable[[], object], longest_s: float = 60.0) -> None:
    """Until it is true; fails after `longest_s`, which is a limit against hanging and no measurement."""
    deadline = time.monotonic() + longest_s
    while not question():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def ready(service: Running) -> bool:
    with service.client() as client:
        return client.get("/readyz").status_code == 200


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@contextmanager
def running(*command: str) -> Iterator[Running]:
    """The command, once it says where it listens."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "passive"}
    process = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True, env=environment)
    service = Running(process)

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            service.lines.append(line)
            if found := re.search(r"serving on (http://\S+)", line):
                service.url = found[1]

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        wait_until(lambda: service.url or process.poll() is not None)
        yield service
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        reader.join(10)
