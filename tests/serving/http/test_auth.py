"""Keys: how they are presented, what is answered without one, and when their file is read again."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from fp8pipe.core.errors import ConfigurationError
from serving.http import admission as auth
from serving.http.admission import OPEN_PATHS, AuthMiddleware, KeyFile, hash_key, is_name, new_key

KEY = "fp8-key"


@pytest.fixture
def keys(tmp_path: Path) -> KeyFile:
    path = tmp_path / "keys"
    path.write_text(f"# who may call\n\n{hash_key('first', 'bob')}\n  {hash_key(KEY, 'alice')}  \n")
    return KeyFile(path)


def call(keys: KeyFile | None, *headers: tuple[bytes, bytes], path: str = "/v1/x") -> tuple[int, Any, dict]:
    """Status, name of the client as the service sees it, and headers of the answer."""
    sent: list[dict[str, Any]] = []
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope.get("state", {}).get("client_name"))
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(AuthMiddleware(app, keys)({"type": "http", "path": path, "headers": list(headers)}, receive, send))
    body = sent[1]["body"] if len(sent) > 1 else b""
    return sent[0]["status"], seen[0] if seen else "refused", dict(sent[0]["headers"]) | {"body": body}


@pytest.mark.parametrize(
    "header",
    [
        (b"authorization", b"Bearer fp8-key"), (b"authorization", b"bEARER   fp8-key "), (b"x-api-key", b" fp8-key "),
    ],
)  # fmt: skip
def test_a_key_may_be_presented_in_two_headers(keys, header):
    assert call(keys, header)[:2] == (200, "alice")


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ((), b"missing_key"), ([(b"authorization", b"Basic fp8-key")], b"missing_key"),
        ([(b"x-forwarded-authorization", b"Bearer fp8-key")], b"missing_key"),
        ([(b"authorization", b"Bearer fp8-kez")], b"wrong_key"), ([(b"x-api-key", b"")], b"wrong_key"),
        ([(b"x-api-key", KEY.encode() + b"x" * 600)], b"wrong_key"),
        ([(b"authorization", b"Bearerfp8-key")], b"missing_key"),
    ],
)  # fmt: skip
def test_without_a_known_key_nobody_is_let_in(keys, headers, code):
    status, name, answered = call(keys, *headers)
    assert (status, name) == (401, "refused")
    assert b'"' + code + b'"' in answered["body"]
    assert answered[b"www-authenticate"] == b"Bearer"


def test_the_first_of_both_headers_counts(keys):
    wrong = (b"x-api-key", b"wrong")
    right = (b"authorization", b"Bearer fp8-key")
    assert call(keys, right, wrong)[0] == 200
    assert call(keys, wrong, right)[0] == 401


def test_probes_carry_no_key_and_without_a_file_nobody_needs_one(keys):
    assert {"/", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"} == OPEN_PATHS
    for path in OPEN_PATHS:
        assert call(keys, path=path)[:2] == (200, None)
    assert call(keys, path="/healthz/x")[0] == 401
    assert call(None)[:2] == (200, None)


def test_every_key_of_the_file_counts_and_the_last_line_names_it(tmp_path):
    path = tmp_path / "keys"
    path.write_text("\n".join([hash_key(KEY, "a"), hash_key("other"), hash_key(KEY, "b")]))
    keys = KeyFile(path)
    assert (keys.name_of(KEY.encode()), keys.name_of(b"other"), keys.name_of(b"none")) == ("b", "line 2", None)


@pytest.mark.parametrize(
    "line", ["sha256:" + "0" * 63, "sha256:" + "0" * 65, "sha256:" + "g" * 64, "md5:" + "0" * 64,
             "sha256:" + "0" * 64 + " two words", "sha256:" + "0" * 64 + " " + "n" * 65]
)  # fmt: skip
def test_a_line_that_is_no_digest_is_refused_and_never_shown(tmp_path, line):
    path = tmp_path / "keys"
    path.write_text(f"# comment\n{line}\n")
    with pytest.raises(ConfigurationError, match="line 2 of") as refused:
        KeyFile(path)
    assert line not in str(refused.value)


@pytest.mark.parametrize("text", ["", "\n# nobody\n"])
def test_a_file_without_keys_is_refused(tmp_path, text):
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigurationError, match="holds no API keys"):
        KeyFile(tmp_path / "keys")


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be read"):
        KeyFile(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        KeyFile(tmp_path / "binary")


def test_the_file_is_looked_at_once_a_second_and_read_when_it_is_another(keys, clock, monkeypatch):
    reads = []
    real = auth._read
    monkeypatch.setattr(auth, "_read", lambda path: reads.append(path) or real(path))
    keys._looked = clock.now
    keys.path.write_text(hash_key("new", "carol"))
    clock.now += 0.5
    assert keys.name_of(b"new") is None
    clock.now += 0.5
    assert keys.name_of(b"new") == "carol"
    assert keys.name_of(KEY.encode()) is None
    for _ in range(3):
        clock.now += 1
        keys.name_of(b"new")
    assert len(reads) == 1


@pytest.mark.parametrize("change", ["time", "size", "inode"])
def test_time_size_or_inode_tell_another_file(keys, change):
    before = keys.path.stat()
    text = keys.path.read_text()
    other = text.replace(hash_key(KEY, "alice"), hash_key("new", "carol"))
    assert len(other) == len(text)
    if change == "inode":
        (keys.path.parent / "next").write_text(other)
        (keys.path.parent / "next").replace(keys.path)
    else:
        keys.path.write_text(other + ("\n" if change == "size" else ""))
    os.utime(keys.path, ns=(before.st_atime_ns, before.st_mtime_ns + (change == "time")))
    keys.reload_if_changed()
    assert keys.name_of(b"new") == "carol"


def test_an_unreadable_file_leaves_the_last_keys_in_force_and_is_not_read_each_time(keys, caplog):
    keys.path.unlink()
    keys.reload_if_changed()
    assert keys.name_of(KEY.encode()) == "alice"
    assert "previous ones remain valid" in caplog.text
    caplog.clear()
    keys.reload_if_changed()
    assert caplog.text == ""
    keys.path.write_text(hash_key("new", "carol"))
    keys.reload_if_changed()
    assert keys.name_of(b"new") == "carol"


def test_keys_and_names():
    assert len({new_key() for _ in range(3)}) == 3
    assert len(new_key()) == len("fp8-") + 43
    assert [is_name(name) for name in ("a.b@c-d_1", "", "two words", "n" * 64, "n" * 65)] == [
        True, False, False, True, False,
    ]  # fmt: skip
