"""Two replicas behind HAProxy with `deploy/haproxy.cfg`: one is killed, both get another artifact, no request fails."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from quantized_families import quantized_family, write_vit_artifact
from running_server import Running, running
from steady_clients import CLIENTS, clients, free_ports

from exporters.onnx.export import export_onnx
from exporters.onnx.target import OnnxExportOptions
from fp8pipe.artifact.record import DIGEST_HEADER

CONFIGURATION = Path(__file__).resolve().parents[3] / "deploy" / "haproxy.cfg"
LINGER_S = 2
pytestmark = pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed")


@contextlib.contextmanager
def proxy(port: int, statistics: int, replicas: list[int]) -> Iterator[None]:
    places = {"ADDRESS": "127.0.0.1", "PORT": str(port), "STATISTICS_PORT": str(statistics)}
    for name, replica in zip("AB", replicas, strict=True):
        places |= {f"HOST_{name}": "127.0.0.1", f"PORT_{name}": str(replica)}
    process = subprocess.Popen(["haproxy", "-db", "-f", str(CONFIGURATION)], env=os.environ | places)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def replica(stack: contextlib.ExitStack, export: Path, port: int) -> Running:
    options = ("--max-batch", "8", "--threads", "1", "--linger-s", str(LINGER_S))
    return stack.enter_context(running(export, *options, port=port))


def wait_until_used(statistics: int, names: str, used: bool = True) -> None:
    """Wait until the proxy sends requests to these replicas, or no longer does."""
    states: dict[str, bool] = {}
    for _ in range(600):
        with contextlib.suppress(httpx.ConnectError):  # the proxy has only just been started
            rows = csv.DictReader(io.StringIO(httpx.get(f"http://127.0.0.1:{statistics}/;csv").text.removeprefix("# ")))
            states = {row["svname"]: row["status"].startswith("UP") for row in rows if row["pxname"] == "replicas"}
            if all(states[name] == used for name in names):
                return
        time.sleep(0.1)
    raise AssertionError(states)


def test_a_killed_and_an_updated_replica_lose_no_request(export: Path, png: bytes, tmp_path: Path) -> None:
    artifact = write_vit_artifact(tmp_path / "vit", quantized_family("timm-vit", bits=4), images=4)
    newer = export_onnx(artifact.root, tmp_path / "newer", OnnxExportOptions()).root
    port, statistics, *replicas = free_ports(4)
    with contextlib.ExitStack() as stack, contextlib.ExitStack() as stopping:  # clients end before the replicas do
        a, b = (replica(stack, export, place) for place in replicas)
        old = httpx.get(f"{a.url}/v1/artifact").headers[DIGEST_HEADER]
        stack.enter_context(proxy(port, statistics, replicas))
        wait_until_used(statistics, "ab")
        load = stopping.enter_context(clients(f"http://127.0.0.1:{port}/v1/classify", png))
        assert {digest for _, digest in load.wait(200)} == {old}

        a.process.kill()  # with requests in flight
        load.wait(200)
        replacement = replica(stack, newer, replicas[0])
        new = httpx.get(f"{replacement.url}/v1/artifact").headers[DIGEST_HEADER]
        wait_until_used(statistics, "ab")
        assert {digest for _, digest in load.wait(400)} == {old, new}

        b.process.send_signal(signal.SIGTERM)  # as a rolling update does
        wait_until_used(statistics, "b", used=False)
        load.wait(100)
        assert b.process.wait(60) == 0
        replica(stack, newer, replicas[1])
        wait_until_used(statistics, "ab")
        load.wait(CLIENTS)
        assert {digest for _, digest in load.wait(200)} == {new}
    failed = Counter(answer for answer in load.answers if answer[0] != 200)
    assert not failed
    assert {digest for _, digest in load.answers} == {old, new}
