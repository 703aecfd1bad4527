"""One JSON line a request on stderr, and the request id that finds it again.

A client's `X-Request-Id` is taken over when it is sane (letters, digits, `._-`, at most 64), so that one id follows a
request through several services; otherwise one is made. Bodies, keys and query strings are never written. The lines
are written by a thread of their own: a full pipe must not stop the service.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import secrets
import sys
import time
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener
from queue import Full, Queue
from typing import Any

from serving.http.metrics import HttpMetrics
from serving.http.problems import Receive, Scope, Send

__all__ = ["AccessLogMiddleware", "start_access_log"]

_SANE = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_LONGEST_PATH = 200
_PENDING = 10_000


class _DroppingHandler(QueueHandler):
    """Lines beyond the queue's size are lost, and requests are not."""

    def enqueue(self, record: logging.LogRecord) -> None:
        """Put without waiting."""
        with contextlib.suppress(Full):
            self.queue.put_nowait(record)


def start_access_log(enabled: bool) -> tuple[logging.Logger, QueueListener | None]:
    """The logger of access lines, and the thread that writes them; call its `stop` at the end."""
    logger = logging.getLogger("fp8pipe_access")
    logger.propagate, logger.handlers = False, []
    logger.setLevel(logging.INFO if enabled else logging.CRITICAL)
    if not enabled:
        return logger, None
    writer = logging.StreamHandler(sys.stderr)
    writer.setFormatter(logging.Formatter("%(message)s"))
    queue: Queue[Any] = Queue(_PENDING)
    logger.addHandler(_DroppingHandler(queue))
    listener = QueueListener(queue, writer)
    listener.start()
    return logger, listener


class AccessLogMiddleware:
    """The outermost layer: request ids, access lines, and the count of requests.

    Args:
        app: the next layer.
        logger: from `start_access_log`.
        metrics: where requests are counted.
        headers: added to every response, for instance the artifact's digest.
    """

    def __init__(
        self, app: Any, logger: logging.Logger, metrics: HttpMetrics, headers: tuple[tuple[bytes, bytes], ...] = ()
    ) -> None:
        self.app, self.logger, self.metrics, self.headers = app, logger, metrics, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI says."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        started, seen = time.perf_counter(), {"status": 0, "sent": 0}

        async def noting(message: Any) -> None:
            if message["type"] == "http.response.start":
                seen["status"] = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode()),
                                      *self.headers]  # fmt: skip
            elif message["type"] == "http.response.body":
                seen["sent"] += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            self._write(scope, request_id, seen, time.perf_counter() - started)

    def _write(self, scope: Scope, request_id: str, seen: dict[str, int], took_s: float) -> None:
        route = getattr(scope.get("route"), "path", None) or "other"
        # 499: the client went away before there was an answer.
        status = seen["status"] or 499
        self.metrics.observe(route, scope["method"], status, took_s)
        if self.logger.isEnabledFor(logging.INFO):
            line = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"), "request_id": request_id,
                "client": (scope.get("client") or ("",))[0], "key": scope["state"].get("client_name", ""),
                "method": scope["method"], "path": scope["path"][:_LONGEST_PATH], "status": status,
                "bytes": seen["sent"], "ms": round(took_s * 1000, 3),
            }  # fmt: skip
            self.logger.info(json.dumps(line))


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SANE.fullmatch(value):
            return str(value, "ascii")
    return secrets.token_hex(8)
