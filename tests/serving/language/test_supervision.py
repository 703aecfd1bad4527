"""The front and the supervisor over a small real server: crashes, signals, orphans, streams, keys and bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from doc_commands import run_command, shell_commands
from prometheus_client.parser import text_string_to_metric_families
from services import ROOT, Running, alive, ready, running, wait_until

from fp8pipe.artifact import open_artifact
from serving.http.admission import hash_key, new_key

STUB = str(Path(__file__).with_name("serve_stub.py"))


def _pids(state: Path) -> list[int]:
    return [int(word) for word in (state / "pids").read_text(encoding="utf-8").split()]


@pytest.fixture
def service(export: Path, tmp_path: Path) -> Iterator[Running]:
    with running(STUB, str(export), str(tmp_path)) as found:
        wait_until(lambda: ready(found))
        yield found


def test_requests_pass_unchanged_and_name_the_artifact(service: Running, export: Path) -> None:
    body = bytes(range(256)) * 1000
    with service.client() as client:
        reply = client.post("/v1/anything?a=%20b", content=body, headers={"X-Request-Id": "mine-1"})
        seen = client.get("/v1/models?x=1%2F2", headers={"Authorization": "Bearer secret"}).json()
        artifact = client.get("/v1/artifact").json()
    assert reply.content == body
    assert reply.headers["x-request-id"] == "mine-1"
    digest = open_artifact(export).digest
    assert reply.headers["x-fp8pipe-artifact"] == f"sha256:{digest}"
    assert artifact["digest"] == digest
    assert seen["path"] == "/v1/models?x=1%2F2"
    assert "secret" not in str(seen)


def test_a_crash_is_answered_cleanly_and_mended(service: Running, tmp_path: Path) -> None:
    before = _pids(tmp_path)
    os.kill(before[0], signal.SIGKILL)
    codes = set()

    def again() -> bool:
        with service.client() as client:
            reply = client.post("/v1/chat/completions", json={"a": 1})
        codes.add(reply.status_code)
        if reply.status_code == 503:
            assert int(reply.headers["retry-after"]) >= 1
            assert reply.json()["error"]["code"] == "engine_unavailable"
        return reply.status_code == 200

    wait_until(lambda: again() and 503 in codes)
    assert codes == {200, 503}
    after = _pids(tmp_path)
    assert not set(before) & set(after)
    wait_until(lambda: not any(map(alive, before)))  # its worker, too
    with service.client() as client:
        families = {f.name: f for f in text_string_to_metric_families(client.get("/metrics").text)}
    assert families["fp8pipe_engine_restarts"].samples[0].value == 1
    assert "vllm:stub" in families


def test_a_stream_that_breaks_ends_with_an_error_event(service: Running, tmp_path: Path) -> None:
    with service.client() as client, client.stream("POST", "/stream", json={"events": 1000}) as reply:
        lines = reply.iter_lines()
        assert next(lines) == "data: 0"
        os.kill(_pids(tmp_path)[0], signal.SIGKILL)
        rest = [line for line in lines if line]
    assert "engine_unavailable" in rest[-1]


def test_sigterm_finishes_what_was_accepted(service: Running, tmp_path: Path) -> None:
    pids, found = _pids(tmp_path), []

    def stream() -> None:
        with service.client() as client, client.stream("POST", "/stream", json={"events": 40}) as reply:
            found.append([line for line in reply.iter_lines() if line])

    threads = [threading.Thread(target=stream) for _ in range(8)]
    for thread in threads:
        thread.start()
    with service.client() as client:
        client.get("/healthz")  # behind the streams, so they have been accepted
        service.process.send_signal(signal.SIGTERM)
        wait_until(lambda: client.get("/readyz").status_code == 503)
    for thread in threads:
        thread.join(60)
    assert [len(lines) for lines in found] == [40] * 8
    assert service.process.wait(60) == 0
    wait_until(lambda: not any(map(alive, pids)))


def test_connections_to_the_engine_are_kept(service: Running) -> None:
    with service.client() as client:
        numbers = {client.get("/v1/models").json()["connection"] for _ in range(30)}
    assert len(numbers) <= 3  # probes use them, too


def test_a_server_that_is_stopped_is_started_again(service: Running, tmp_path: Path) -> None:
    before = _pids(tmp_path)
    os.kill(before[0], signal.SIGSTOP)
    with service.client() as client:
        reply = client.post("/v1/completions", json={"a": 1})
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_unavailable")
        assert int(reply.headers["retry-after"]) >= 1
    wait_until(lambda: ready(service) and not set(before) & set(_pids(tmp_path)))
    wait_until(lambda: not any(map(alive, before)))


def test_an_engine_that_hangs_behind_a_healthy_server_is_started_again(service: Running, tmp_path: Path) -> None:
    before = _pids(tmp_path)
    (tmp_path / "hang").touch()
    with service.client() as client:
        assert client.get("/health").status_code == 200
        reply = client.post("/v1/completions", json={"a": 1})
        (tmp_path / "hang").unlink()
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_unavailable")
    wait_until(lambda: ready(service) and not set(before) & set(_pids(tmp_path)))
    assert "has generated no token for" in "".join(service.lines)


def test_an_answer_that_takes_too_long_is_a_504(export: Path, tmp_path: Path) -> None:
    with running(STUB, str(export), str(tmp_path), "-", '{"request_timeout_s": 0.5}') as service:
        wait_until(lambda: ready(service))
        (tmp_path / "hang").touch()
        with service.client() as client:
            reply = client.post("/v1/completions", json={"a": 1})
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "engine_timeout")


def test_the_drain_ends_long_streams_with_an_error_event(export: Path, tmp_path: Path) -> None:
    with running(STUB, str(export), str(tmp_path), "-", '{"drain_seconds": 2}') as service:
        wait_until(lambda: ready(service))
        with service.client() as client, client.stream("POST", "/stream", json={"events": 100_000}) as reply:
            lines = reply.iter_lines()
            assert next(lines) == "data: 0"
            service.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]  # raises if the connection broke instead of ending
        assert len(rest) > 10
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert service.process.wait(60) == 0


def test_nothing_outlives_a_killed_supervisor(service: Running, tmp_path: Path) -> None:
    pids = _pids(tmp_path)
    assert all(map(alive, pids))
    service.process.kill()
    wait_until(lambda: not any(map(alive, pids)))


def test_a_first_start_that_fails_ends_the_service(export: Path, tmp_path: Path) -> None:
    (tmp_path / "refuse").touch()
    with running(STUB, str(export), str(tmp_path)) as service:
        assert service.process.wait(60) == 12
    assert "the model does not load" in "".join(service.lines)


def test_keys(export: Path, tmp_path: Path) -> None:
    key = new_key()
    (tmp_path / "keys").write_text(hash_key(key, "alice") + "\n", encoding="utf-8")
    with running(STUB, str(export), str(tmp_path), str(tmp_path / "keys")) as service:
        wait_until(lambda: ready(service))
        with service.client() as client:
            for path in ("/v1/models", "/v1/artifact", "/metrics"):
                assert client.get(path).status_code == 401
                assert client.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 401
                assert client.get(path, headers={"Authorization": f"Bearer {key}"}).status_code == 200
            assert client.get("/healthz").status_code == 200
        _documented_lines_work(service.url, key, tmp_path)
    assert key not in "".join(service.lines)


def _documented_lines_work(url: str, key: str, folder: Path) -> None:
    """The lines with curl in docs/serving-language.md, as they stand there."""
    lines = [line for line in shell_commands(ROOT / "docs/serving-language.md") if line.text.startswith("curl ")]
    assert len(lines) >= 3
    for line in lines if shutil.which("curl") else ():
        done = run_command(line, folder, {"http://127.0.0.1:8000": url, "curl ": "curl -sS --fail-with-body "}, KEY=key)
        assert done.returncode == 0, f"{line.text}: {done.stdout}{done.stderr}"


def test_a_body_over_the_limit_is_refused(service: Running) -> None:
    with service.client() as client:
        assert client.post("/v1/completions", content=b"x" * 1_000_001).status_code == 413
        assert client.post("/v1/completions", content=iter([b"x" * 600_000] * 2)).status_code == 413
        assert client.post("/v1/completions", content=b"x" * 1_000_000).status_code == 200
