"""Admission control: API keys, limits on request bodies, and rate limits.

API keys are stored as digests in a file, one `sha256:<hex> [name]` per line; `#` begins a comment. A key has 256 random
bits, so a single sha256 is enough: it cannot be brute-forced. The digest of a key that a client sends is compared with
every stored digest in constant time. The file is read again on SIGHUP and when its modification time, size or inode has
changed (checked at most once a second). If it has become unreadable, the last valid keys stay in use and an error is
logged. To make a line of the file:

    printf %s "$KEY" | sha256sum | awk '{print "sha256:" $1 " alice"}'

The size of a body is counted as it arrives, regardless of Content-Length, and it must be complete by a deadline: a body
that arrives too slowly is answered with 408. The bodies of all connections together are limited too, since a thousand
bodies of a permitted size could exhaust the memory: a body that exceeds this limit is answered with 503. The rate limit
is a token bucket per API key, or per client address if no keys are configured.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import math
import re
import secrets
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

from fp8pipe.core.errors import ConfigurationError
from serving.http.problems import Problem, Receive, Scope, Send, overloaded, send_problem

logger = logging.getLogger(__name__)

# Health probes send no key, and the web page contains no secrets.
OPEN_PATHS = frozenset(("/", "/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"))
_NAME = r"[\w.@-]{1,64}"
_LINE = re.compile(rf"sha256:([0-9a-f]{{64}})(?:\s+({_NAME}))?")
_LOOK_EVERY_S = 1.0
_MAX_KEY_LENGTH = 512
_MAX_CLIENTS = 10_000
# At most this many bytes, for at most this many seconds, are read and discarded before an error is sent: a client whose
# connection is closed while it still sends the body would not read the response.
_DISCARD_BYTES = 256_000_000
_DISCARD_S = 5.0
_CLOSE = {"Connection": "close"}


def new_key() -> str:
    """Generate an API key of 256 random bits."""
    return f"fp8-{secrets.token_urlsafe(32)}"


def hash_key(key: str, name: str = "") -> str:
    """The line to put into the key file for `key`."""
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()} {name}".strip()


def is_name(text: str) -> bool:
    """Whether `text` is a valid name for a key."""
    return re.fullmatch(_NAME, text) is not None


class KeyFile:
    """The API keys in the file `path`, which is read again when it changes.

    Raises:
        ConfigurationError: the file is unreadable, contains no keys, or has an invalid line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp = self._look()
        self._keys = _read(path)
        if not self._keys:
            raise ConfigurationError(
                f"{path} holds no API keys", why="no client could call", fix="add one key per line"
            )
        self._looked = time.monotonic()

    def name_of(self, key: bytes) -> str | None:
        """The name of a key that a client sent; None if it is unknown.

        The digest of `key` is compared with every stored digest, so that the time does not depend on which one matches.
        """
        if time.monotonic() - self._looked >= _LOOK_EVERY_S:
            self.reload_if_changed()
        digest = hashlib.sha256(key).hexdigest()
        found = None
        for stored, name in self._keys:
            if hmac.compare_digest(stored, digest):
                found = name
        return found

    def reload_if_changed(self) -> None:
        """Read the file again if it has changed."""
        self._looked = time.monotonic()
        if self._look() != self._stamp:
            self.reload()

    def reload(self) -> None:
        """Read the file again; if it cannot be read, keep the last valid keys."""
        stamp = self._look()
        try:
            self._keys = _read(self.path)
        except ConfigurationError as error:
            logger.error(
                "the API keys could not be reloaded, the previous ones remain valid: %s (%s)", error.what, error.why
            )
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
    """Rejects requests without a known API key with 401; all are accepted if `keys` is None.

    Clients send the key as `Authorization: Bearer KEY` or `X-API-Key: KEY`. Paths in `OPEN_PATHS` need no key.
    """

    def __init__(self, app: Any, keys: KeyFile | None) -> None:
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface; stores the name of the key in the request state as `client_name`."""
        if self.keys is None or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        key = _presented(scope)
        name = None if key is None else self.keys.name_of(key)
        if name is None:
            code, message = "wrong_key", "this API key is not known"
            if key is None:
                code, message = "missing_key", "an API key is needed"
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
    """Read (digest, name) of every key from a key file; a key without a name gets the name `line N`."""
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
        if match is None:  # the line is not shown: it may be a key in plain text
            what, why = f"line {number} of {path} is not an API key's digest", "it is not 'sha256:<64 hex> [name]'"
            fix = "create keys with fp8pipe serve-key, and add the line it prints to the file"
            raise ConfigurationError(what, why=why, fix=fix)
        keys.append((match[1], match[2] or f"line {number}"))
    return tuple(keys)


class BodyBudget:
    """The number of bytes of request bodies in memory, over all connections, and its limit."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.held = max_bytes, 0


class BodyAccount:
    """The bytes that one request has reserved from a `BodyBudget`, until it is answered.

    It is stored in the request's state as `body_account`.
    """

    def __init__(self, budget: BodyBudget) -> None:
        self._budget, self._held = budget, 0

    def take(self, count: int) -> None:
        """Reserve `count` more bytes.

        Raises:
            Problem: 503, the budget would be exceeded.
        """
        if self._budget.held + count > self._budget.max_bytes:
            raise overloaded("the request bodies in memory are too large in total at the moment", _CLOSE)
        self._budget.held += count
        self._held += count

    def close(self) -> None:
        """Return all reserved bytes to the budget."""
        self._budget.held -= self._held
        self._held = 0


class BodyLimitMiddleware:
    """Limits the size of a body, the time until it has arrived, and the total size of all bodies."""

    def __init__(self, app: Any, max_bytes: int, timeout_s: float, budget: BodyBudget) -> None:
        self.app, self.max_bytes, self.timeout_s, self.budget = app, max_bytes, timeout_s, budget

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface; for a body over a limit, the app's `receive` raises a `Problem`."""
        stated = dict(scope["headers"]).get(b"content-length", b"")
        if stated.isdigit() and int(stated[:20]) > self.max_bytes:
            await refuse(self._too_large(), scope, receive, send)
            return
        account = BodyAccount(self.budget)
        scope.setdefault("state", {})["body_account"] = account
        try:
            await self.app(scope, self._limited(receive, account), send)
        finally:
            account.close()

    def _limited(self, receive: Receive, account: BodyAccount) -> Receive:
        """Wrap `receive` so that it enforces the limits on size and time."""
        left, complete = self.max_bytes, False
        deadline = asyncio.get_running_loop().time() + self.timeout_s

        async def limited() -> Any:
            nonlocal left, complete
            if complete:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                late = f"the body did not arrive within {self.timeout_s:g} s"
                raise Problem(408, "body_too_slow", late, "send the body faster, or a smaller one", _CLOSE) from None
            if message["type"] == "http.request":
                size = len(message.get("body", b""))
                left -= size
                complete = not message.get("more_body", False)
                try:
                    if left < 0:
                        raise self._too_large()
                    account.take(size)
                except Problem:
                    if not complete:
                        await _discard(receive)
                    raise
            return message

        return limited

    def _too_large(self) -> Problem:
        what = f"the body is larger than {self.max_bytes / 1e6:g} MB"
        return Problem(413, "body_too_large", what, "send smaller or fewer images", _CLOSE)


async def refuse(problem: Problem, scope: Scope, receive: Receive, send: Send) -> None:
    """Send an error response to a request whose body has not been read.

    The body is read and discarded first, unless the client waits for `100 Continue` before sending it.
    """
    if (b"expect", b"100-continue") not in ((name, value.lower()) for name, value in scope["headers"]):
        await _discard(receive)
    await send_problem(problem, scope, receive, send)


async def _discard(receive: Receive) -> None:
    # Read and drop the rest of a request's body, within limits on size and time.
    left = _DISCARD_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_S):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body", False):  # the last part, or the client disconnected
                    return


class RateLimitMiddleware:
    """Rejects requests beyond a rate with 429: a token bucket per API key, or per address without keys.

    Args:
        app: the wrapped ASGI app.
        rate: requests per second; None for no limit.
        burst: requests that may come at once; None for two seconds' worth.
        free: paths that are not limited.
    """

    def __init__(self, app: Any, rate: float | None, burst: int | None, free: frozenset[str]) -> None:
        self.app, self.rate, self.free = app, rate, free
        self.burst = float(burst or max(1, math.ceil(2 * (rate or 1))))
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface."""
        if self.rate is not None and scope["path"] not in self.free:
            wait_s = self._take(_client(scope), self.rate)
            if wait_s > 0:
                after, what = str(math.ceil(wait_s)), f"more than {self.rate:g} requests per second"
                problem = Problem(429, "rate_limited", what, f"try again in {after} s", {"Retry-After": after})
                await refuse(problem, scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _take(self, client: str, rate: float) -> float:
        """Take a token from the client's bucket; returns 0, or the seconds until the next token if there was none."""
        now = time.monotonic()
        tokens, then = self._buckets.pop(client, (self.burst, now))
        tokens = min(self.burst, tokens + (now - then) * rate)
        taken = tokens >= 1
        self._buckets[client] = (tokens - 1 if taken else tokens, now)
        if len(self._buckets) > _MAX_CLIENTS:
            self._buckets.popitem(last=False)
        return 0.0 if taken else (1 - tokens) / rate


def _client(scope: Scope) -> str:
    name = scope.get("state", {}).get("client_name")
    return f"key {name}" if name else str((scope.get("client") or ("",))[0])
