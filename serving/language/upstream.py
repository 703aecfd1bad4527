"""A minimal HTTP/1.1 client for the proxy, which forwards requests to one server on a Unix socket.

The proxy may add at most 1 ms to a request, and general-purpose clients alone take longer. This one sends headers and
body in one write, parses responses with httptools, passes on body bytes as they arrive, and keeps connections open for
the next request. It never repeats a request, since generation is not idempotent.
"""

from __future__ import annotations

import asyncio
from collections import deque
from pathlib import Path

import httptools

Headers = list[tuple[bytes, bytes]]
_BUFFERED_BYTES = 262_144
# Seconds after which an idle connection is not used again. This is shorter than the server's keep-alive timeout
# (`KEEP_ALIVE_S`), so that the server never closes a connection that has just been reused.
_IDLE_S = 30.0
KEEP_ALIVE_S = 120


class UpstreamError(Exception):
    """The server could not be reached, or closed the connection early; the message says which and is only logged."""


class _Connection:
    """One connection, for one request at a time; the methods `on_...` are callbacks of httptools."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self.writer = reader, writer
        self._broken = False
        self.used = 0.0

    def begin(self, *, head_only: bool) -> None:
        """Reset the state for a new request."""
        self._parser = httptools.HttpResponseParser(self)
        self.head_only = head_only
        self.headers: Headers = []
        self.status = 0
        self.complete = self.keep = False
        self._chunks: list[bytes] = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        if self.status < 200:  # 1xx: another set of headers follows
            self.status, self.headers = 0, []
        elif self.head_only:
            self.complete = True

    def on_body(self, body: bytes) -> None:
        self._chunks.append(body)

    def on_message_complete(self) -> None:
        if self.status:
            self.complete = True
            self.keep = self._parser.should_keep_alive()  # the parser resets this right after the callback

    @property
    def lost(self) -> bool:
        """Whether the connection has ended."""
        return self._broken or self._reader.at_eof() or self.writer.transport.is_closing()

    async def receive(self) -> None:
        """Wait for data and parse it; also returns when the connection has ended, see `lost`."""
        try:
            if data := await self._reader.read(_BUFFERED_BYTES):
                self._parser.feed_data(data)
        except (httptools.HttpParserError, OSError):
            self.close()
            return
        if not data:
            # A body without a length ends with the connection; one with a length has been truncated.
            keys = {name for name, _ in self.headers}
            self.complete |= bool(self.status) and not keys & {b"content-length", b"transfer-encoding"}
            self._broken = True

    def take(self) -> bytes:
        """Return the bytes of the body that arrived since the last call; empty if there are none."""
        data = b"".join(self._chunks)
        self._chunks.clear()
        return data

    def close(self) -> None:
        self._broken = True
        self.writer.transport.abort()


class Reply:
    """A response whose headers have arrived.

    Attributes:
        status: HTTP status.
        headers: the headers in order, names in lower case, hop-by-hop headers included.
    """

    def __init__(self, owner: Upstream, connection: _Connection) -> None:
        self._owner, self._connection = owner, connection
        self.status, self.headers = connection.status, connection.headers

    async def next(self) -> bytes | None:
        """The next bytes of the body; None at its end.

        Raises:
            UpstreamError: the server closed the connection early.
        """
        connection = self._connection
        while not (part := connection.take()):
            if connection.complete:
                return None
            if connection.lost:
                raise UpstreamError("it closed the connection in the middle of a response")
            await connection.receive()
        return part

    @property
    def finished(self) -> bool:
        """Whether the last bytes have arrived, so that they and the end of the response can be sent in one write."""
        return self._connection.complete

    def release(self) -> None:
        """Give the connection back for reuse.

        If the response was not read to its end, the connection is closed, which makes the server cancel the request.
        """
        self._owner._give_back(self._connection)


class Upstream:
    """A client for the server at the Unix socket `path`, with a pool of idle connections."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._idle: deque[_Connection] = deque()

    async def request(self, method: bytes, target: bytes, headers: Headers, body: bytes = b"") -> Reply:
        """Send a request, and return the response as soon as its headers have arrived.

        `target` is path and query. `headers` must not contain hop-by-hop headers, Host or Content-Length. The caller
        must call `release` on the result.

        Raises:
            UpstreamError: the server cannot be reached, or closed the connection before it answered.
        """
        connection = await self._take()
        connection.begin(head_only=method == b"HEAD")
        lines = [b"%b %b HTTP/1.1" % (method, target), b"host: vllm"]
        lines += [b"%b: %b" % item for item in headers]
        if body or method in (b"POST", b"PUT", b"PATCH"):
            lines.append(b"content-length: %d" % len(body))
        connection.writer.write(b"\r\n".join(lines) + b"\r\n\r\n" + body)
        try:
            while not connection.status:
                if connection.lost:
                    raise UpstreamError("it closed the connection before it responded")
                await connection.receive()
        except BaseException:
            connection.close()
            raise
        return Reply(self, connection)

    async def fetch(self, method: bytes, target: bytes, headers: Headers, body: bytes = b"") -> tuple[int, bytes]:
        """Send a request, see `request`, and return status and complete body of the response.

        Raises the errors of `request` and `Reply.next`.
        """
        reply, parts = await self.request(method, target, headers, body), []
        try:
            while (part := await reply.next()) is not None:
                parts.append(part)
            return reply.status, b"".join(parts)
        finally:
            reply.release()

    async def get(self, target: bytes, timeout_s: float) -> bytes | None:
        """Send a GET request, and return the body; None if it fails, takes longer than `timeout_s`, or is not a 200."""
        try:
            async with asyncio.timeout(timeout_s):
                status, body = await self.fetch(b"GET", target, [])
                return body if status == 200 else None
        except (UpstreamError, TimeoutError):
            return None

    def close(self) -> None:
        """Close idle connections."""
        while self._idle:
            self._idle.pop().close()

    async def _take(self) -> _Connection:
        # An idle connection that is still usable, or a new one.
        while self._idle:
            connection = self._idle.pop()
            if not connection.lost and asyncio.get_running_loop().time() - connection.used < _IDLE_S:
                return connection
            connection.close()
        try:
            return _Connection(*await asyncio.open_unix_connection(str(self.path), limit=_BUFFERED_BYTES))
        except OSError as error:
            raise UpstreamError(f"it does not accept connections: {error.strerror}") from error

    def _give_back(self, connection: _Connection) -> None:
        if connection.complete and connection.keep and not connection.lost and not connection.head_only:
            connection.used = asyncio.get_running_loop().time()
            self._idle.append(connection)
        else:
            connection.close()
