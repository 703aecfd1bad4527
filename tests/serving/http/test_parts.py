"""The layers one by one: keys, limits, protocol, over real sockets where the network matters."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import socket
import threading
import time

import httpx
import pytest
from pydantic import ValidationError

from fp8pipe.core.errors import ConfigurationError
from serving.config import ServeConfig
from serving.http.admission import KeyFile, RateLimitMiddleware, hash_key, new_key
from serving.http.problems import Problem, send_problem
from serving.http.server import Lifecycle, Service
from serving.http.service import wrap
from serving.http.telemetry import HttpMetrics


async def _echo(scope, receive, send):
    """Reads the body and says its length."""
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
            if message["type"] == "lifespan.shutdown":
                return
    size, more = 0, True
    try:
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
    except Problem as problem:
        await send_problem(problem, scope, receive, send)
        return
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


@contextlib.contextmanager
def _served(**settings):
    config = ServeConfig(port=0, linger_s=0, **settings)
    lifecycle = Lifecycle(ready=True)
    logger = logging.getLogger("silent")
    logger.disabled = True
    app = wrap(_echo, config, keys=None, lines=logger, metrics=HttpMetrics(), lifecycle=lifecycle)
    server = Service(app, config, lifecycle)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.port
    server.should_exit = True
    thread.join(30)
    assert not thread.is_alive()


def _talk(port, data):
    """What comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(data)
        found = b""
        while part := connection.recv(65536):
            found += part
    return found


def test_a_key_file_is_read_strictly(tmp_path):
    path, key = tmp_path / "keys", new_key()
    path.write_text(f"{hash_key(key, 'alice')}\n{hash_key('other')}\n")
    keys = KeyFile(path)
    assert keys.name_of(key.encode()) == "alice"
    assert keys.name_of(b"other") == "line 2"
    assert keys.name_of(b"") is None
    path.write_text("a-key-in-clear\n")
    with pytest.raises(ConfigurationError) as caught:
        KeyFile(path)
    assert "a-key-in-clear" not in str(caught.value)
    keys.reload()
    assert keys.name_of(key.encode()) == "alice"
    path.write_text("")
    keys.reload_if_changed()
    assert keys.name_of(key.encode()) is None
    with pytest.raises(ConfigurationError, match="no API keys"):
        KeyFile(path)


def test_the_documented_shell_line_makes_a_key_line():
    assert hash_key("secret", "alice") == f"sha256:{hashlib.sha256(b'secret').hexdigest()} alice"


def test_a_configuration_knows_its_keys():
    with pytest.raises(ValidationError):
        ServeConfig(prot=1)


def test_bodies_are_counted_while_they_stream():
    with _served(max_body_mb=0.001) as port:
        url = f"http://127.0.0.1:{port}/"
        assert httpx.post(url, content=b"x" * 1000).text == "1000"
        assert httpx.post(url, content=b"x" * 1001).status_code == 413
        assert httpx.post(url, content=iter([b"x" * 600] * 2)).status_code == 413


def test_bodies_of_all_connections_are_bounded():
    with _served(max_body_mb=0.1, max_total_body_mb=0.25) as port:
        held = [socket.create_connection(("127.0.0.1", port), timeout=30) for _ in range(2)]
        head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
        for connection in held:
            connection.sendall(head + b"x" * 99_999)
        time.sleep(0.3)
        url = f"http://127.0.0.1:{port}/"
        refused = httpx.post(url, content=b"x" * 60_000)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json()["error"]["code"] == "overloaded"
        assert httpx.post(url, content=b"x" * 40_000).text == "40000"
        held[0].sendall(b"x")
        assert held[0].recv(1000).startswith(b"HTTP/1.1 200 ")
        # answered or left: nothing is held any more
        assert httpx.post(url, content=b"x" * 100_000).text == "100000"
        held[1].close()
        time.sleep(0.3)
        assert [httpx.post(url, content=b"x" * 100_000).status_code for _ in range(3)] == [200] * 3
        held[0].close()
    with pytest.raises(ValidationError, match="less than max_body_mb"):
        ServeConfig(max_body_mb=600)


def test_requests_that_are_cut_off_are_answered():
    with _served() as port:
        for data in (b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\n", b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\nabc"):
            with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
                connection.sendall(data)
                time.sleep(0.1)
                connection.shutdown(socket.SHUT_WR)
                found = connection.recv(65536)
            assert found.startswith(b"HTTP/1.1 400 "), data
            assert b'"cut_off"' in found
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(100) == b""


def test_bytes_after_a_request_that_are_none(caplog):
    """The connection ends with one answer, and what was being worked on does not write after it."""
    with _served() as port:
        found = _talk(port, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc\x00garbage\r\n\r\n")
        assert found.count(b"HTTP/1.1 ") == 1
        assert found.startswith(b"HTTP/1.1 400 ")
        pipelined = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 2
        _talk(port, pipelined + b"\x00garbage\r\n\r\n")
        assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 200
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_slow_headers_and_slow_bodies_are_ended():
    with _served(header_timeout_s=0.3, body_timeout_s=0.3) as port:
        assert _talk(port, b"").startswith(b"HTTP/1.1 408 ")
        assert _talk(port, b"GET / HTTP/1.1\r\nHost:").startswith(b"HTTP/1.1 408 ")
        slow = _talk(port, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc")
        assert slow.startswith(b"HTTP/1.1 408 ")
        assert b"body_too_slow" in slow


def test_what_is_no_http_is_answered_in_json():
    with _served() as port:
        found = _talk(port, b"\x16\x03\x01 hello\r\n\r\n")
        assert found.startswith(b"HTTP/1.1 400 ")
        assert b'"invalid_http"' in found
        large = _talk(port, b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 200_000)
        assert large.startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 "))


def test_connections_beyond_the_limit_are_refused():
    with _served(max_connections=2) as port:
        held = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        time.sleep(0.2)
        assert _talk(port, b"").startswith(b"HTTP/1.1 503 ")
        for connection in held:
            connection.close()


def test_request_ids_are_taken_over_when_sane():
    with _served() as port:
        url = f"http://127.0.0.1:{port}/"
        assert httpx.get(url, headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
        made = httpx.get(url, headers={"X-Request-Id": 'a b"c'}).headers["x-request-id"]
        assert made != 'a b"c'
        assert made.isalnum()


def test_a_bucket_of_tokens():
    """Two at once, then one every two hours: no clock decides this test."""
    limit = RateLimitMiddleware(_echo, 1 / 7200, 2, frozenset())
    assert [limit._take("a", 1 / 7200) > 0 for _ in range(3)] == [False, False, True]
    assert limit._take("b", 1 / 7200) == 0

    sent = []

    async def call():
        async def send(message):
            sent.append(message)

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        scope = {"type": "http", "path": "/v1/classify", "headers": [], "client": ("a", 1), "state": {}}
        limit._buckets["a"] = (0.0, time.monotonic())
        await limit(scope, receive, send)

    asyncio.run(call())
    assert sent[0]["status"] == 429
    assert dict(sent[0]["headers"])[b"retry-after"].isdigit()


def test_cors_is_off_unless_asked_for():
    with _served() as port:
        answer = httpx.get(f"http://127.0.0.1:{port}/", headers={"Origin": "https://a.example"})
        assert "access-control-allow-origin" not in answer.headers
    with _served(cors_origins=("https://a.example",)) as port:
        answer = httpx.get(f"http://127.0.0.1:{port}/", headers={"Origin": "https://a.example"})
        assert answer.headers["access-control-allow-origin"] == "https://a.example"
