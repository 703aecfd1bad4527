"""An HTTP/1.1 client for one server on a Unix socket, as thin as a proxy needs it.

General clients cost more than the whole budget of a request here (1 ms). This one sends a head and a body in one
write, parses answers with httptools, hands body bytes on as they arrive, and keeps connections for the next request.
It never sends a request twice: a generation is not idempotent.
"""

from __future__ import annotations

import asyncio
from collections import deque
from pathlib import Path
from typing import cast

import httptools

__all__ = ["Headers", "Reply", "Upstream", "UpstreamError"]

Headers = list[tuple[bytes, bytes]]
_BUFFERED_BYTES = 262_144
# Shorter than the server's own patience (`KEEP_ALIVE_S`), so that it never closes a connection just taken.
_IDLE_S = 30.0
KEEP_ALIVE_S = 120


class UpstreamError(Exception):
    """The server could not be reached, or broke off; `str` says which, for logs only."""


class _Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.lost = False
        self.used = 0.0
        self.begin(head_only=False)

    def begin(self, *, head_only: bool) -> None:
        """Forget the last answer."""
        self.parser = httptools.HttpResponseParser(self)
        self.head_only = head_only
        self.headers: Headers = []
        self.status = 0
        self.complete = False
        self.keep = False
        self.chunks: deque[bytes] = deque()
        self.buffered = 0
        self.waiter: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's are no subclasses

    def data_received(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self.close()
        self._wake()

    def eof_received(self) -> None:
        self._ended()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended()

    def _ended(self) -> None:
        # A body without a length ends with its connection; one with a length is cut short.
        keys = {name for name, _ in self.headers}
        if self.status and not self.complete and not keys & {b"content-length", b"transfer-encoding"}:
            self.complete = True
        self.lost = True
        self._wake()

    def _wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.status = self.parser.get_status_code()
        if self.status < 200:  # 1xx: another head follows
            self.status, self.headers = 0, []
        elif self.head_only:
            self.complete = True

    def on_body(self, body: bytes) -> None:
        self.chunks.append(body)
        self.buffered += len(body)
        if self.buffered > _BUFFERED_BYTES and self.transport is not None:
            self.transport.pause_reading()

    def on_message_complete(self) -> None:
        if self.status:
            self.complete = True
            self.keep = self.parser.should_keep_alive()  # forgotten by the parser right after this call

    async def wait(self) -> None:
        """Until something arrived."""
        self.waiter = asyncio.get_running_loop().create_future()
        await self.waiter

    def take(self) -> bytes:
        """Everything that has arrived of the body."""
        data = b"".join(self.chunks) if len(self.chunks) != 1 else self.chunks[0]
        self.chunks.clear()
        if self.buffered > _BUFFERED_BYTES and self.transport is not None and not self.lost:
            self.transport.resume_reading()
        self.buffered = 0
        return data

    def close(self) -> None:
        self.lost = True
        if self.transport is not None:
            self.transport.abort()

    @property
    def reusable(self) -> bool:
        return self.complete and not self.lost and not self.head_only and self.keep


class Reply:
    """An answer whose head has arrived.

    Attributes:
        status: of HTTP.
        headers: names in lower case, in order, hop-by-hop ones included.
    """

    def __init__(self, owner: Upstream, connection: _Connection) -> None:
        self._owner, self._connection = owner, connection
        self.status, self.headers = connection.status, connection.headers

    async def next(self) -> bytes | None:
        """The next bytes of the body, None at its end.

        Raises:
            UpstreamError: the server broke off.
        """
        connection = self._connection
        while not connection.chunks:
            if connection.complete:
                return None
            if connection.lost:
                raise UpstreamError("it broke off within an answer")
            await connection.wait()
        return connection.take()

    @property
    def finished(self) -> bool:
        """Whether nothing more will come, so that the last bytes and the end can go in one write."""
        return self._connection.complete and not self._connection.chunks

    async def read(self) -> bytes:
        """The whole body. Raises as `next`."""
        parts = []
        while (part := await self.next()) is not None:
            parts.append(part)
        return b"".join(parts)

    def release(self) -> None:
        """Give the connection back, or close it when the answer was not read to its end (the server then stops)."""
        self._owner._give_back(self._connection)


class Upstream:
    """The server behind a Unix socket, and the connections to it that are idle.

    Args:
        path: the socket.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._idle: deque[_Connection] = deque()

    async def request(self, method: bytes, target: bytes, headers: Headers, body: bytes = b"") -> Reply:
        """Send a request; return when the head of the answer is there.

        Args:
            method: of HTTP.
            target: path and query, as the client sent them.
            headers: without hop-by-hop ones, Host and Content-Length.
            body: the whole body.

        Raises:
            UpstreamError: the server is not there, or broke off before it answered.
        """
        connection = await self._take()
        connection.begin(head_only=method == b"HEAD")
        lines = [b"%b %b HTTP/1.1" % (method, target), b"host: vllm"]
        lines += [b"%b: %b" % item for item in headers]
        if body or method in (b"POST", b"PUT", b"PATCH"):
            lines.append(b"content-length: %d" % len(body))
        assert connection.transport is not None
        connection.transport.write(b"\r\n".join(lines) + b"\r\n\r\n" + body)
        try:
            while not connection.status:
                if connection.lost:
                    raise UpstreamError("it broke off before it answered")
                await connection.wait()
        except BaseException:
            connection.close()
            raise
        return Reply(self, connection)

    def close(self) -> None:
        """Close idle connections."""
        while self._idle:
            self._idle.pop().close()

    async def _take(self) -> _Connection:
        loop = asyncio.get_running_loop()
        while self._idle:
            connection = self._idle.pop()
            if not connection.lost and loop.time() - connection.used < _IDLE_S:
                return connection
            connection.close()
        try:
            _, connection = await loop.create_unix_connection(_Connection, str(self.path))
        except OSError as error:
            raise UpstreamError(f"it does not listen: {error.strerror}") from error
        return connection

    def _give_back(self, connection: _Connection) -> None:
        if not connection.reusable:
            connection.close()
            return
        connection.used = asyncio.get_running_loop().time()
        self._idle.append(connection)
