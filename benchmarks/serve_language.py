"""What serving a language export costs above vLLM itself, and what it does under an open-loop load.

    python benchmarks/serve_language.py EXPORT [--requests 300] [--rate 4 8] [--seconds 20]

The overhead is measured on one running vLLM: the same request alternately through the service's port and straight into
vLLM's own socket, so that both see the same machine. The load is open-loop: requests start at random times of a given
rate whether or not earlier ones have ended, so that a slow server does not slow its own test. The last line is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import httpx

SERVE = """
import sys
from pathlib import Path
from fp8pipe import logs
from serving.http.config import ServeConfig
from serving.language.arguments import LanguageConfig
from serving.language.server import serve_language
logs.setup(json=False, quiet=False, verbose=False)
sys.exit(serve_language(Path(sys.argv[1]), ServeConfig(port=0), LanguageConfig(enforce_eager=True, served_name="m")))
"""
Call = Callable[[httpx.AsyncClient], Awaitable[float]]


def percentiles(times_s: list[float]) -> dict[str, float]:
    """Milliseconds."""
    cuts = statistics.quantiles(times_s, n=100, method="inclusive")
    return {name: round(cuts[i] * 1000, 3) for name, i in (("p50", 49), ("p90", 89), ("p99", 98))}


async def models(client: httpx.AsyncClient) -> float:
    """A request that costs vLLM next to nothing."""
    started = time.perf_counter()
    (await client.get("/v1/models")).raise_for_status()
    return time.perf_counter() - started


async def completion(client: httpx.AsyncClient, tokens: int = 1) -> float:
    """A short greedy completion."""
    body = {"model": "m", "prompt": "Hello", "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    started = time.perf_counter()
    (await client.post("/v1/completions", json=body)).raise_for_status()
    return time.perf_counter() - started


async def streamed(client: httpx.AsyncClient) -> float:
    """Sixteen tokens, streamed."""
    body = {"model": "m", "prompt": "Hello", "max_tokens": 16, "temperature": 0, "ignore_eos": True, "stream": True}
    started = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=body) as reply:
        reply.raise_for_status()
        async for _ in reply.aiter_bytes():
            pass
    return time.perf_counter() - started


def cpu_s(pid: int) -> float:
    """Processor time of a process so far: unlike the clock, it does not count waiting for a busy core."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def overhead(
    served: httpx.AsyncClient, direct: httpx.AsyncClient, call: Call, count: int, front: int
) -> dict[str, float]:
    """Both roads, alternately; each pair in random order."""
    through, straight = [], []
    for _ in range(10):
        await call(served), await call(direct)
    before = cpu_s(front)
    for _ in range(count):
        roads = [(served, through), (direct, straight)]
        random.shuffle(roads)
        for client, times in roads:
            times.append(await call(client))
    used = (cpu_s(front) - before) / count
    added = statistics.median(through) - statistics.median(straight)
    low = [statistics.quantiles(times, n=10)[0] for times in (through, straight)]
    return {
        "front_cpu_ms": round(used * 1000, 3),
        "added_at_p10_ms": round((low[0] - low[1]) * 1000, 3),
        "through_ms": round(statistics.median(through) * 1000, 3),
        "direct_ms": round(statistics.median(straight) * 1000, 3),
        "added_ms": round(added * 1000, 3),
        "median_of_differences_ms": round(
            statistics.median(a - b for a, b in zip(through, straight, strict=True)) * 1000, 3
        ),
    }


async def open_loop(client: httpx.AsyncClient, rate: float, seconds: float) -> dict[str, object]:
    """Requests of 16 tokens at random times."""
    times: list[float] = []
    errors = 0

    async def one() -> None:
        nonlocal errors
        try:
            times.append(await completion(client, 16))
        except httpx.HTTPError:
            errors += 1

    tasks, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        tasks.append(asyncio.create_task(one()))
        await asyncio.sleep(random.expovariate(rate))
    await asyncio.gather(*tasks)
    return {"rate": rate, "requests": len(tasks), "errors": errors, **percentiles(times)}


async def measure(url: str, socket: str, options: argparse.Namespace, front: int) -> dict[str, object]:
    direct_transport = httpx.AsyncHTTPTransport(uds=socket)
    limits = httpx.Limits(max_connections=None)
    async with (
        httpx.AsyncClient(base_url=url, timeout=120, limits=limits, trust_env=False) as served,
        httpx.AsyncClient(base_url="http://vllm", transport=direct_transport, timeout=120) as direct,
    ):
        while (await served.get("/readyz")).status_code != 200:
            await asyncio.sleep(0.5)
        found: dict[str, object] = {"machine": platform.platform(), "python": platform.python_version()}
        for call in (models, completion, streamed):
            found[call.__name__] = await overhead(served, direct, call, options.requests, front)
            print(call.__name__, found[call.__name__], flush=True)
        found["open_loop"] = [await open_loop(served, rate, options.seconds) for rate in options.rate]
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path)
    parser.add_argument("--requests", type=int, default=300, help="pairs of requests a kind (300)")
    parser.add_argument("--rate", type=float, nargs="*", default=[4.0, 8.0], help="requests a second (4 8)")
    parser.add_argument("--seconds", type=float, default=20.0, help="length of each open-loop run (20)")
    options = parser.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TMPDIR": folder}
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(options.export)], stderr=subprocess.PIPE, text=True, env=environment
        )
        try:
            assert process.stderr is not None
            url = next(m[1] for line in process.stderr if (m := re.search(r"serving on (http://\S+)", line)))
            threading.Thread(target=process.stderr.read, daemon=True).start()
            socket = str(next(Path(folder).glob("fp8pipe-serve-*")) / "vllm.sock")
            print(json.dumps(asyncio.run(measure(url, socket, options, process.pid))))
        finally:
            process.terminate()
            process.wait(60)


if __name__ == "__main__":
    main()
