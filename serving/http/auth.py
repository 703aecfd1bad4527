"""API keys from a file of digests: `sha256:<hex> [name]`, one per line; `#` begins a comment.

A key is 256 random bits, so one round of sha256 hides it: there is nothing to guess. Presented keys are hashed and
compared with every stored digest in constant time. The file is looked at again when its time or size changes, at
most once a second, and on SIGHUP; a file that has become unreadable leaves the last good keys in force, with an error
in the log. A line for the file:

    printf %s "$KEY" | sha256sum | awk '{print "sha256:" $1 " alice"}'
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import secrets
import time
from pathlib import Path
from typing import Any

from fp8pipe.core.errors import ConfigurationError
from serving.http.limits import refuse
from serving.http.problems import Problem, Receive, Scope, Send

__all__ = ["OPEN_PATHS", "AuthMiddleware", "KeyFile", "hash_key", "is_name", "new_key"]

logger = logging.getLogger(__name__)

# Probes carry no key, and the page holds no secret.
OPEN_PATHS = frozenset(("/", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"))
_NAME = r"[\w.@-]{1,64}"
_LINE = re.compile(rf"sha256:([0-9a-f]{{64}})(?:\s+({_NAME}))?")
_LOOK_EVERY_S = 1.0
_MAX_KEY_LENGTH = 512


def new_key() -> str:
    """A new key: 256 random bits."""
    return f"fp8-{secrets.token_urlsafe(32)}"


def hash_key(key: str, name: str = "") -> str:
    """The line of the key file for `key`."""
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()} {name}".strip()


def is_name(text: str) -> bool:
    """Whether a key may be called so."""
    return re.fullmatch(_NAME, text) is not None


class KeyFile:
    """The keys of a file that are accepted now.

    Raises:
        ConfigurationError: unreadable, without keys, or with a line that is none.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp = self._look()
        self._keys = _read(path)
        if not self._keys:
            raise ConfigurationError(f"{path} holds no API keys", why="nobody could call", fix="add one per line")
        self._looked = time.monotonic()

    def name_of(self, key: bytes) -> str | None:
        """The name of the presented key; None when it is no key. Every stored digest is compared."""
        if time.monotonic() - self._looked >= _LOOK_EVERY_S:
            self.reload_if_changed()
        digest = hashlib.sha256(key).hexdigest()
        found = None
        for stored, name in self._keys:
            if hmac.compare_digest(stored, digest):
                found = name
        return found

    def reload_if_changed(self) -> None:
        """Read the file again if it is another."""
        self._looked = time.monotonic()
        if self._look() != self._stamp:
            self.reload()

    def reload(self) -> None:
        """Read the file again; the last good keys stay where it cannot be read."""
        stamp = self._look()
        try:
            self._keys = _read(self.path)
        except ConfigurationError as error:
            logger.error("the API keys are still the former ones: %s (%s)", error.what, error.why)
        else:
            logger.info("%d API keys read from %s", len(self._keys), self.path.name)
        self._stamp = stamp

    def _look(self) -> tuple[int, int, int] | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size, status.st_ino


class AuthMiddleware:
    """Refuses requests without a known key: `Authorization: Bearer KEY` or `X-API-Key: KEY`."""

    def __init__(self, app: Any, keys: KeyFile | None, open_paths: frozenset[str] = OPEN_PATHS) -> None:
        self.app, self.keys, self.open_paths = app, keys, open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The key's name is put into the state as `client_name`."""
        if self.keys is None or scope["path"] in self.open_paths:
            await self.app(scope, receive, send)
            return
        key = _presented(scope)
        name = None if key is None else self.keys.name_of(key)
        if name is None:
            code, message = ("missing_key", "an API key is needed") if key is None else (
                "wrong_key", "this API key is not known")  # fmt: skip
            fix = "send it as 'Authorization: Bearer KEY' or 'X-API-Key: KEY'"
            await refuse(Problem(401, code, message, fix, {"WWW-Authenticate": "Bearer"}), scope, receive, send)
            return
        scope.setdefault("state", {})["client_name"] = name
        await self.app(scope, receive, send)


def _presented(scope: Scope) -> bytes | None:
    for name, value in scope["headers"]:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return bytes(value[7:].strip()[:_MAX_KEY_LENGTH])
        if name == b"x-api-key":
            return bytes(value.strip()[:_MAX_KEY_LENGTH])
    return None


def _read(path: Path) -> tuple[tuple[str, str], ...]:
    """(digest, name) of every key; the line number stands for a missing name."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"the API key file {path} cannot be read", why=str(error), fix="give a readable text file"
        ) from error
    keys = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        match = _LINE.fullmatch(text)
        if match is None:  # never shown: it may be a key in clear
            raise ConfigurationError(
                f"line {number} of {path} is no API key's digest", why="it is not 'sha256:<64 hex digits> [name]'",
                fix="make keys with fp8pipe serve-key, and write its line into the file",
            )  # fmt: skip
        keys.append((match[1], match[2] or f"line {number}"))
    return tuple(keys)
