"""uvicorn's HTTP protocol with what it lacks: a time limit for headers, a limit of connections, and JSON errors.

uvicorn waits for ever for the headers of a first request, which is all that a slow-loris needs. And a client that ends
its side within a request gets no answer from it, although it may still read one.
"""

from __future__ import annotations

import json
from asyncio import TimerHandle
from http import HTTPStatus
from typing import Any, ClassVar

from uvicorn.protocols.http.auto import AutoHTTPProtocol

__all__ = ["limited_protocol"]

_MAX_HEADER_BYTES = 65_536
# After a refusal the connection stays half open: closed with unread bytes, it would take the answer along.
_LINGER_S = 0.5
# What a client has sent before it could know of the end is still answered.
_LAST_CALL_S = 1.0


def limited_protocol(header_timeout_s: float, max_connections: int) -> type:
    """A protocol class for `uvicorn.Config(http=...)`, on the parser that is installed."""
    limits = {"header_timeout_s": header_timeout_s, "max_connections": max_connections}
    return type("LimitedProtocol", (_LimitedProtocol,), limits)


class _LimitedProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """One connection."""

    header_timeout_s: ClassVar[float]
    max_connections: ClassVar[int]
    _timer: TimerHandle | None = None
    _header_bytes = 0
    _refused = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            self._refuse(503, "too_many_connections", "too many connections", "Retry-After: 1\r\n")
        else:
            self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._over:
            return
        before = self.cycle
        super().data_received(data)
        if self._over:
            return
        if self.cycle is not None and not (self.cycle is before and self.cycle.response_complete):
            self._disarm()  # the headers are complete
            self._header_bytes = 0
            return
        self._header_bytes += len(data)
        if self._header_bytes > _MAX_HEADER_BYTES:
            self._refuse(431, "headers_too_large", "the headers are too large")
        elif self._timer is None:
            self._arm()

    def eof_received(self) -> bool | None:
        if self._over or self.pipeline:
            return None
        cycle = self.cycle
        in_body = cycle is not None and cycle.more_body and not cycle.response_started
        if not in_body and not self._header_bytes:
            return None  # between requests, or the client has left before its answer
        self._refuse(400, "cut_off", "the connection ended before the request did")
        return True  # the transport stays until the answer is out

    def shutdown(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.loop.call_later(_LAST_CALL_S, self._end)
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "invalid_http", "the request is not valid HTTP")

    @property
    def _over(self) -> bool:
        return bool(self._refused or self.transport.is_closing())

    def _end(self) -> None:
        if not self.transport.is_closing():
            super().shutdown()

    def _arm(self) -> None:
        self._timer = self.loop.call_later(self.header_timeout_s, self._expire)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        if not self._over:
            self._refuse(408, "headers_too_slow", "the headers did not arrive in time")

    def _refuse(self, status: int, code: str, message: str, extra: str = "") -> None:
        self._disarm()
        self._refused = True
        cycle = self.cycle
        if self.pipeline or (cycle is not None and cycle.response_started and not cycle.response_complete):
            self.transport.close()  # an answer here would be taken for another request's
            return
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True  # it is given up: after this answer none can be written
            cycle.message_event.set()
        error = {"code": code, "message": message, "fix": "", "request_id": ""}
        body = json.dumps({"error": error}).encode()
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\n{extra}connection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.close)
