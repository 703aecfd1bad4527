"""A real `fp8pipe serve` in a process of its own, on a free port."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Running:
    """A server.

    Attributes:
        url: where it listens.
        port: the port.
        process: to signal.
        lines: what it has written on stderr so far.
    """

    url: str
    port: int
    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)


@contextlib.contextmanager
def running(export: Path, *options: str, port: int = 0, **variables: str) -> Iterator[Running]:
    """Serve `export`, which no validation has seen, until the block ends, with further variables in the environment."""
    environment = os.environ | {"PYTHONPATH": str(_ROOT), "OMP_WAIT_POLICY": "passive"} | variables
    command = [sys.executable, "-P", "-m", "fp8pipe", "serve", str(export), "--port", str(port), "--unvalidated"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, env=environment)
    server = Running("", 0, process)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            server.lines.append(line)
            if match := re.match(r"serving on (http://[\d.]+:(\d+))", line):
                server.url, server.port = match[1], int(match[2])
                break
        if not server.port:
            raise AssertionError("the server did not start:\n" + "".join(server.lines))
        threading.Thread(target=lambda: server.lines.extend(process.stderr or ()), daemon=True).start()
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
