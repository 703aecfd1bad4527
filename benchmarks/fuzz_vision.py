"""Send random requests to the vision server, and check that it responds to all of them without server errors.

    python benchmarks/fuzz_vision.py [EXPORT] [--requests 20000] [--schema 0.25]

Without EXPORT a tiny model is exported and served. By default, schemathesis generates a quarter of the requests from
the OpenAPI document; the others are raw bytes (tests/support/fuzz_requests.py). The last line is JSON and includes the
server's memory over time. The exit code is 1 if a status is 5xx other than 503 (overload), if a response is missing or
malformed, if the server logs an error, or if it does not end properly. Samples of faults are printed to stderr.
"""

from __future__ import annotations

import argparse
import json
import platform
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from fuzz_requests import Outcome, fuzz
from fuzz_schema import fuzz_schema
from running_server import running
from tiny_exports import write_export

from fp8pipe.core.machine import cpu_model, distribution_version

_ROUNDS = 10  # number of parts into which the raw requests are split, to measure memory after each


def resident_mb(pid: int) -> int:
    """Resident memory of a process, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) // 1024


def attack(server, requests, schema):
    """Send all requests to a server.

    Args:
        server: the running server.
        requests: total number of requests.
        schema: share of requests that are generated from the OpenAPI document.

    Returns:
        The outcome of the raw requests, the number of responses to the others by status, and the server's resident
        memory over time, in MiB.
    """
    name = httpx.get(f"{server.url}/v1/artifact").json()["name"]
    model = httpx.get(f"{server.url}/v2/models/{name}").json()
    raw, memory = Outcome(), [resident_mb(server.process.pid)]
    for number in range(_ROUNDS):
        found = fuzz(server.port, round(requests * (1 - schema)) // _ROUNDS, number, model)
        raw.statuses += found.statuses
        raw.unanswered += found.unanswered
        raw.broken += found.broken
        memory.append(resident_mb(server.process.pid))
    drawn = fuzz_schema(server.url, round(requests * schema), name)
    memory.append(resident_mb(server.process.pid))
    return raw, drawn, memory


def main() -> int:
    """Start a server, send the requests, print the result as JSON, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("export", nargs="?")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--schema", type=float, default=0.25, help="share of requests from the OpenAPI document")
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        export = Path(arguments.export) if arguments.export else write_export(Path(scratch), "timm-vit")
        limits = ("--no-access-log", "--max-body-mb", "2", "--threads", "1", "--max-batch", "4", "--linger-s", "0")
        with running(export, *limits) as server:
            raw, drawn, memory = attack(server, arguments.requests, arguments.schema)
            ready = httpx.get(f"{server.url}/readyz").status_code
            server.process.send_signal(signal.SIGTERM)
            code = server.process.wait(60)
            first = next((n for n, line in enumerate(server.lines) if line.startswith("ERROR")), len(server.lines))
            errors = sum(line.startswith("ERROR") for line in server.lines)
    for sample in (*raw.unanswered[:5], *raw.broken[:5]):
        print(sample[:400], file=sys.stderr)
    print("".join(server.lines[first : first + 60]), file=sys.stderr)
    statuses: Counter[int] = raw.statuses + drawn
    faults = sum(count for status, count in statuses.items() if status >= 500 and status != 503)
    result = {
        "requests": sum(statuses.values()), "raw": dict(sorted(raw.statuses.items())),
        "schema": dict(sorted(drawn.items())), "5xx_but_503": faults, "503": statuses[503],
        "unanswered": len(raw.unanswered), "broken": len(raw.broken), "resident_mb": memory,
        "errors_in_log": errors, "ready_after": ready, "exit_code": code,
        "seconds": round(time.monotonic() - started), "cpu": cpu_model(), "python": platform.python_version(),
        "onnxruntime": distribution_version("onnxruntime"),
    }  # fmt: skip
    print(json.dumps(result))
    return int(bool(faults or raw.unanswered or raw.broken or errors or ready != 200 or code))


if __name__ == "__main__":
    sys.exit(main())
