"""What a worker process and the process that measures it say to each other, a line of JSON at a time.

A worker writes one line when it is ready, then waits: for each line that it receives it does its work once, and writes
the figures. It ends when its standard input is closed. Libraries print, too, so the lines begin with a mark, and every
other line is ignored. This module imports only the standard library, since workers run in the environments of peers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping

MARK = "benchmark: "


def say(figures: Mapping[str, object]) -> None:
    """Write one line of JSON."""
    print(f"{MARK}{json.dumps(figures)}", flush=True)


def read(line: str) -> dict[str, object] | None:
    """The figures in a line of a worker; None if something else printed it."""
    found: dict[str, object] | None = json.loads(line[len(MARK) :]) if line.startswith(MARK) else None
    return found


def serve(work: Callable[[], Mapping[str, object]], **ready: object) -> None:
    """Say `ready`, then do `work` for every line of standard input, and write its figures."""
    say(ready)
    for _ in sys.stdin:
        say(work())
