"""Limits of what one request, one client and one slow sender may take.

The body is counted while it streams, whatever Content-Length says, and must have arrived by a deadline: a body that
trickles in is answered 408. The bodies of all connections together are bounded too, or a thousand permitted ones would
fill the memory: what does not fit is answered 503. The rate is a bucket of tokens per key, or per address where there
are no keys.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from typing import Any

from serving.http.problems import Problem, Receive, Scope, Send, overloaded, send_problem

__all__ = ["BodyAccount", "BodyBudget", "BodyLimitMiddleware", "RateLimitMiddleware", "account_of", "refuse"]

_MAX_CLIENTS = 10_000
# Before refusing, this much is read and thrown away: a sender that is cut off while sending never reads the answer.
_DISCARD_BYTES = 256_000_000
_DISCARD_S = 5.0
_CLOSE = {"Connection": "close"}


class BodyBudget:
    """How many bytes of bodies the service holds, and may hold, over all connections."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.held = max_bytes, 0


class BodyAccount:
    """What one request holds of a budget, until it is answered."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget, self._held = budget, 0

    def take(self, count: int) -> None:
        """Hold `count` bytes more.

        Raises:
            Problem: 503, they do not fit.
        """
        if self._budget.held + count > self._budget.max_bytes:
            raise overloaded("the bodies of all requests together are too large now", _CLOSE)
        self._budget.held += count
        self._held += count

    def close(self) -> None:
        """Hold nothing any more."""
        self._budget.held -= self._held
        self._held = 0


def account_of(scope: Scope) -> BodyAccount:
    """The account of a request, for bodies that grow after they were received."""
    account: BodyAccount = scope["state"]["body_account"]
    return account


class BodyLimitMiddleware:
    """Bounds a body's size, its time of arrival, and the size of all bodies."""

    def __init__(self, app: Any, max_bytes: int, timeout_s: float, budget: BodyBudget) -> None:
        self.app, self.max_bytes, self.timeout_s, self.budget = app, max_bytes, timeout_s, budget

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What the app sees of a body that cannot be taken is a `Problem`, raised by `receive`."""
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
        """A `receive` that counts bytes and time."""
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
                raise Problem(408, "body_too_slow", late, "send it faster, or less", _CLOSE) from None
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
        limit = f"{self.max_bytes / 1e6:g} MB"
        return Problem(
            413, "body_too_large", f"the body is larger than {limit}", "send smaller or fewer images", _CLOSE
        )


async def refuse(problem: Problem, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer before the body was read: it is thrown away first, unless the client waits to be asked for it."""
    if (b"expect", b"100-continue") not in ((name, value.lower()) for name, value in scope["headers"]):
        await _discard(receive)
    await send_problem(problem, scope, receive, send)


async def _discard(receive: Receive) -> None:
    left = _DISCARD_BYTES
    try:
        async with asyncio.timeout(_DISCARD_S):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


class RateLimitMiddleware:
    """A bucket of tokens per client: `rate` requests per second, `burst` at once. Probes are free."""

    def __init__(self, app: Any, rate: float | None, burst: int | None, free: frozenset[str]) -> None:
        self.app, self.rate, self.free = app, rate, free
        self.burst = float(burst or max(1, math.ceil(2 * (rate or 1))))
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface."""
        if self.rate is not None and scope["path"] not in self.free:
            wait_s = self._take(_client(scope), self.rate)
            if wait_s > 0:
                after = str(math.ceil(wait_s))
                problem = Problem(
                    429, "rate_limited", f"more than {self.rate:g} requests per second", f"try again in {after} s",
                    {"Retry-After": after},
                )  # fmt: skip
                await refuse(problem, scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _take(self, client: str, rate: float) -> float:
        """Seconds until there is a token; 0 when one was taken."""
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
