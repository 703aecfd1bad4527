"""Measure the overhead of a language service over vLLM alone, and its latency under an open-loop load.

    python benchmarks/serve_language.py EXPORT [--pairs 300] [--rate 1 2] [--seconds 20]
    python benchmarks/serve_language.py EXPORT --proxy-only
    python benchmarks/serve_language.py --running URL --socket PATH --pid PID --model NAME [--key KEY]

The overhead is measured on one running engine: a blocking client with little overhead of its own sends the same request
alternately through the service and directly to the engine's socket, so that both are measured under the same
conditions. This is done first with an engine that responds immediately, to measure the proxy alone, and then with vLLM.
In the open-loop test, requests start at random times with a given mean rate, whether or not earlier requests have been
answered, so that a slow server does not reduce its own load. The third form measures a service that is already running,
given its address, vLLM's socket and the process id of the service. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx

SERVE = """
import os, sys
from pathlib import Path
from fp8pipe.artifact import open_artifact
from fp8pipe.core.progress import setup_logging
from serving.config import LanguageConfig, ServeConfig
from serving.http.service import Proof
from serving.language.server import run_front, serve_language, supervise
setup_logging(json=False, quiet=False, verbose=False)
export, engine, folder = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
service = ServeConfig(port=0, unvalidated=True)
language = LanguageConfig(enforce_eager=True, served_model_name="m", max_num_seqs=16)
if engine == "vllm":
    sys.exit(serve_language(export, service, language))
path = folder / "instant.sock"
supervisor = supervise([sys.executable, engine, str(path)], dict(os.environ), path, folder / "log", "m", language)
sys.exit(run_front(supervisor, open_artifact(export, verify=False), service, language, Proof("unvalidated", "", {})))
"""
_INSTANT = Path(__file__).with_name("instant_engine.py")


@dataclass(frozen=True)
class Target:
    """A running service: its address, the engine's socket, its process id, the model's name and an API key."""

    url: str
    socket: str
    pid: int
    model: str = "m"
    key: str = ""


class Caller:
    """A blocking HTTP client that uses one connection for all requests."""

    def __init__(self, connection: socket.socket, key: str) -> None:
        self._connection, self._key = connection, key

    def call(self, method: str, path: str, document: object = None) -> float:
        """Send a request and wait for the whole response; returns the time in seconds.

        Args:
            method: the HTTP method.
            path: the path of the request.
            document: the body, sent as JSON; None for no body.
        """
        body = b"" if document is None else json.dumps(document).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self._key}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        started = time.perf_counter()
        self._connection.sendall(head.encode() + body)
        found = b""
        while not self._whole(found):
            part = self._connection.recv(65536)
            assert part, found
            found += part
        took = time.perf_counter() - started
        assert found.startswith(b"HTTP/1.1 200"), found[:500]
        return took

    def _whole(self, found: bytes) -> bool:
        head, end, body = found.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.I)
        return bool(end) and (body.endswith(b"0\r\n\r\n") if length is None else len(body) >= int(length[1]))


def percentiles(times_s: list[float]) -> dict[str, float]:
    """The 50th, 90th and 99th percentile of times given in seconds, in milliseconds."""
    cuts = statistics.quantiles(times_s, n=100, method="inclusive")
    return {name: round(cuts[i] * 1000, 1) for name, i in (("p50", 49), ("p90", 89), ("p99", 98))}


def cpu_s(pid: int) -> float:
    """Processor time of all threads of a process so far, in seconds; this excludes time spent waiting for a core."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text(encoding="utf-8").split()[0]) for task in tasks) / 1e9


def overhead(target: Target, pairs: int, method: str, path: str, document: object = None) -> dict[str, float]:
    """Send pairs of equal requests, one through the service and one directly to the engine, in random order.

    Args:
        target: the service.
        pairs: number of measured pairs; some more are sent first to warm up.
        method: the HTTP method.
        path: the path of the request.
        document: the body, sent as JSON; None for no body.

    Returns:
        In milliseconds: median latency `through` the service and `direct`, their difference `added`, the same
        difference at the 10th percentile, and the service's processor time per request.
    """
    parts = urlsplit(target.url)
    served = socket.create_connection((parts.hostname or "", parts.port or 80), timeout=120)
    served.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    direct = socket.socket(socket.AF_UNIX)
    direct.connect(target.socket)
    through: list[float] = []
    straight: list[float] = []
    with served, direct:
        paths = [(Caller(served, target.key), through), (Caller(direct, ""), straight)]
        for number in range(pairs + min(100, pairs // 4)):
            if number == min(100, pairs // 4):  # end of the warm-up
                through.clear(), straight.clear()
                before = cpu_s(target.pid)
            random.shuffle(paths)
            for caller, times in paths:
                times.append(caller.call(method, path, document))
        used = (cpu_s(target.pid) - before) / pairs
    medians = statistics.median(through), statistics.median(straight)
    found = {
        "through": medians[0], "direct": medians[1], "added": medians[0] - medians[1],
        "added_at_p10": statistics.quantiles(through, n=10)[0] - statistics.quantiles(straight, n=10)[0],
        "front_cpu": used,
    }  # fmt: skip
    return {name: round(value * 1000, 3) for name, value in found.items()}


async def open_loop(target: Target, rate: float, seconds: float) -> dict[str, object]:
    """Send streamed requests of 16 tokens at random times.

    Args:
        target: the service.
        rate: mean number of requests per second.
        seconds: duration of the test.

    Returns:
        Numbers of requests and errors, tokens per second, and percentiles in milliseconds of the time to the last byte
        (`whole_ms`) and to the first (`first_token_ms`).
    """
    whole: list[float] = []
    first: list[float] = []
    errors = 0
    body = {"model": target.model, "prompt": "Hello", "max_tokens": 16, "temperature": 0, "ignore_eos": True,
            "stream": True}  # fmt: skip

    async def one(client: httpx.AsyncClient) -> None:
        nonlocal errors
        started, begun = time.perf_counter(), 0.0
        try:
            async with client.stream("POST", "/v1/completions", json=body) as reply:
                reply.raise_for_status()
                async for _ in reply.aiter_bytes():
                    begun = begun or time.perf_counter() - started
            whole.append(time.perf_counter() - started)
            first.append(begun)
        except httpx.HTTPError:
            errors += 1

    headers = {"Authorization": f"Bearer {target.key}"} if target.key else {}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=target.url, timeout=120, limits=limits, trust_env=False, headers=headers
    ) as client:
        tasks, began = [], time.perf_counter()
        while time.perf_counter() < began + seconds:
            tasks.append(asyncio.create_task(one(client)))
            await asyncio.sleep(random.expovariate(rate))
        await asyncio.gather(*tasks)
        took = time.perf_counter() - began
    return {"rate": rate, "requests": len(tasks), "errors": errors, "tokens_per_s": round(16 * len(whole) / took, 1),
            "whole_ms": percentiles(whole), "first_token_ms": percentiles(first)}  # fmt: skip


@contextmanager
def serving(export: Path, engine: str) -> Iterator[Target]:
    """A context with a running service that is ready.

    Args:
        export: the export to serve.
        engine: `vllm`, or the path of a script that is run as the engine.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", SERVE, str(export), engine, folder]
        environment = {**os.environ, "TMPDIR": folder}
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        try:
            assert process.stderr is not None
            url = next((m[1] for line in process.stderr if (m := re.search(r"serving on (http://\S+)", line))), None)
            if url is None:
                raise SystemExit("the service did not start")
            threading.Thread(target=process.stderr.read, daemon=True).start()
            with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
                while client.get("/readyz").status_code != 200:
                    time.sleep(0.5)
            yield Target(url, str(next(Path(folder).rglob("*.sock"))), process.pid)
        finally:
            process.terminate()
            process.wait(120)


def measure(target: Target, options: argparse.Namespace) -> dict[str, object]:
    """Measure the overhead for several kinds of requests, and the open-loop latency, of a service on vLLM."""
    completion = {"model": target.model, "prompt": "Hello", "max_tokens": 1, "temperature": 0}
    stream = completion | {"max_tokens": 16, "ignore_eos": True, "stream": True}
    found: dict[str, object] = {
        "models": overhead(target, options.pairs, "GET", "/v1/models"),
        "completion_of_1": overhead(target, options.pairs, "POST", "/v1/completions", completion),
        "stream_of_16": overhead(target, max(2, options.pairs // 5), "POST", "/v1/completions", stream),
    }
    print(json.dumps(found), flush=True)
    return found | {"open_loop": [asyncio.run(open_loop(target, rate, options.seconds)) for rate in options.rate]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, nargs="?")
    parser.add_argument(
        "--proxy-only", action="store_true", help="only with an engine that answers instantly, without vLLM"
    )
    parser.add_argument("--pairs", type=int, default=300, help="pairs of requests per kind (300)")
    parser.add_argument(
        "--rate",
        type=float,
        nargs="*",
        default=[1.0, 2.0],
        help="rates of the open-loop runs, requests per second (1 2)",
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each open-loop run, seconds (20)")
    names = {"running": "its address", "socket": "vLLM's socket", "model": "its name", "key": "a key"}
    for name, what in names.items():
        parser.add_argument(f"--{name}", default="m" if name == "model" else "", help=f"a running service: {what}")
    parser.add_argument("--pid", type=int, default=0, help="a running service: its process")
    options = parser.parse_args()
    random.seed(0)
    found: dict[str, object] = {
        "machine": platform.processor() or platform.machine(), "python": platform.python_version(),
        "load": os.getloadavg(),
    }  # fmt: skip
    if options.running:
        target = Target(options.running, options.socket, options.pid, options.model, options.key)
        found["vllm"] = measure(target, options)
    else:
        with serving(options.export, str(_INSTANT)) as target:
            body = {"model": "m", "prompt": "Hello", "max_tokens": 1}
            found["proxy_alone"] = overhead(target, 10 * options.pairs, "POST", "/v1/completions", body)
            print(json.dumps(found["proxy_alone"]), flush=True)
        if not options.proxy_only:
            with serving(options.export, "vllm") as target:
                found["vllm"] = measure(target, options)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
