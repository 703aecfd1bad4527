"""From start to end: refusal of damage, keys, overload, SIGTERM under load."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import signal
import socket
import time

import httpx
import pytest
from click.testing import CliRunner
from running_server import running
from small_artifacts import details_of

from fp8pipe.cli import main


def test_a_changed_file_is_not_served(export, tmp_path):
    copy = shutil.copytree(export, tmp_path / "tiny")
    data = bytearray((copy / "model.onnx").read_bytes())
    data[-1] ^= 1
    (copy / "model.onnx").write_bytes(data)
    result = CliRunner().invoke(main, ["serve", str(copy), "--port", "0", "--unvalidated"])
    assert result.exit_code == 12
    assert "sha256" in result.output


def test_a_dry_run_serves_nothing(export):
    plan = ["serve", str(export), "--dry-run", "--json", "--max-batch", "3"]
    assert CliRunner().invoke(main, plan).exit_code == 14  # nothing has validated it
    result = CliRunner().invoke(main, [*plan, "--unvalidated"])
    assert result.exit_code == 0
    assert '"max_batch": 3' in result.stdout
    assert CliRunner().invoke(main, ["serve", str(export), "--max-batch", "0"]).exit_code == 10


def test_a_taken_port_is_said(export):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        plan = ["serve", str(export), "--port", port, "--max-batch", "1", "--threads", "1", "--unvalidated"]
        result = CliRunner().invoke(main, plan)
    assert result.exit_code == 10
    assert "cannot listen" in result.output


def test_keys_are_asked_for_and_read_again(export, png, tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"# ours\nsha256:{hashlib.sha256(b'one').hexdigest()} alice\n")
    with running(export, "--api-key-file", str(path), "--max-batch", "1", "--threads", "1") as server:

        def call(**headers):
            headers["Content-Type"] = "image/png"
            return httpx.post(f"{server.url}/v1/classify", content=png, headers=headers)

        assert call().json()["error"]["code"] == "missing_key"
        assert call(Authorization="Bearer two").json()["error"]["code"] == "wrong_key"
        assert call(Authorization="Bearer one").status_code == 200
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        assert httpx.get(f"{server.url}/healthz").status_code == 200
        path.write_text(f"sha256:{hashlib.sha256(b'two').hexdigest()} bob\n")
        os.kill(server.process.pid, signal.SIGHUP)
        end = time.monotonic() + 120
        while call(**{"X-API-Key": "two"}).status_code != 200 and time.monotonic() < end:
            time.sleep(0.1)
        assert call(**{"X-API-Key": "two"}).status_code == 200
        assert call(Authorization="Bearer one").status_code == 401
        written = "".join(server.lines)
        assert '"key": "alice"' in written
        assert "Bearer" not in written


def test_overload_is_shed_and_passes(export, png):
    with running(export, "--max-batch", "1", "--threads", "1", "--queue", "2", "--max-wait-ms", "0") as server:

        async def flood():
            async with httpx.AsyncClient(limits=httpx.Limits(max_connections=40), timeout=120) as client:
                post = {"content": png, "headers": {"Content-Type": "image/png"}}
                return await asyncio.gather(*(client.post(f"{server.url}/v1/classify", **post) for _ in range(40)))

        answers = asyncio.run(flood())
        assert {answer.status_code for answer in answers} == {200, 503}
        assert all(a.headers["retry-after"] == "1" for a in answers if a.status_code == 503)
        after = httpx.post(f"{server.url}/v1/classify", content=png, headers={"Content-Type": "image/png"}, timeout=60)
        assert after.status_code == 200


def test_sigterm_under_load_drops_no_accepted_request(export, png):
    with running(export, "--max-batch", "4", "--threads", "1", "--linger-s", "1") as server:

        async def worker(found):
            async with httpx.AsyncClient(timeout=60) as client:
                while True:
                    try:
                        answer = await client.post(f"{server.url}/v1/classify", content=png,
                                                   headers={"Content-Type": "image/png"})  # fmt: skip
                    except httpx.ConnectError:  # not accepted any more
                        return
                    found.append(answer.status_code)

        async def load():
            found: list[int] = []
            workers = [asyncio.create_task(worker(found)) for _ in range(8)]
            while len(found) < 20:
                await asyncio.sleep(0.05)
            server.process.send_signal(signal.SIGTERM)
            await asyncio.sleep(0.2)
            ready = await httpx.AsyncClient().get(f"{server.url}/readyz")
            # A ReadError or RemoteProtocolError of a worker is a dropped request, and raises here.
            await asyncio.gather(*workers)
            return found, ready.status_code

        found, ready = asyncio.run(load())
        assert set(found) == {200}
        assert ready == 503
        assert server.process.wait(60) == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads /proc")
def test_a_tensorrt_export_without_a_gpu_is_refused(export, tmp_path):
    from fp8pipe.artifact import ArtifactWriter, open_artifact
    from fp8pipe.core.machine import gpus

    if gpus():
        pytest.skip("there is a GPU")
    old = open_artifact(export)
    with ArtifactWriter(tmp_path / "trt", kind="trt-export", stage="export") as writer:
        for entry in old.manifest.files:
            shutil.copy(export / entry.path, writer.root / entry.path)
        writer.commit(config={}, seed=None, parents=old.manifest.parents, details=details_of("trt-export"))
    result = CliRunner().invoke(main, ["serve", str(tmp_path / "trt"), "--port", "0"])
    assert result.exit_code == 11
    assert "no GPU" in result.output
