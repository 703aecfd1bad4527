"""An HTTP/1.1 client for one server on a Unix socket, as thin as a proxy needs it.

General clients cost more than the whole budget of a request here (1 ms). This one sends a head and a body in one
write, parses answers with httptools, hands body bytes on as they arrive, and keeps connections for the next request.
It never sends a request twice: a generation is not idempotent.
"""

from __future__ import annotations

import asyncio
from collections import deque
from pathlib import Path

import httptools

Headers = list[tuple[bytes, bytes]]
_BUFFERED_BYTES = 262_144
# Shorter than the server's own patience (`KEEP_ALIVE_S`), so that it never closes a connection just taken.
_IDLE_S = 30.0
KEEP_ALIVE_S = 120


class UpstreamError(Exception):
    """The server could not be reached, or broke off; `str` says which, for logs only."""


class _Connection:
    """One connection, one request at a time; its methods called `on_...` are httptools' interface."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self.writer = reader, writer
        self._broken = False
        self.used = 0.0

    def begin(self, *, head_only: bool) -> None:
        """Forget the last answer."""
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
        if self.status < 200:  # 1xx: another head follows
            self.status, self.headers = 0, []
        elif self.head_only:
            self.complete = True

    def on_body(self, body: bytes) -> None:
        self._chunks.append(body)

    def on_message_complete(self) -> None:
        if self.status:
            self.complete = True
            self.keep = self._parser.should_keep_alive()  # forgotten by the parser right after this call

    @property
    def lost(self) -> bool:
        """Whether it has ended."""
        return self._broken or self._reader.at_eof() or self.writer.transport.is_closing()

    async def receive(self) -> None:
        """Until something arrived and is parsed, or the connection has ended."""
        try:
            if data := await self._reader.read(_BUFFERED_BYTES):
                self._parser.feed_data(data)
        except (httptools.HttpParserError, OSError):
            self.close()
            return
        if not data:
            # A body without a length ends with its connection; one with a length is cut short.
            keys = {name for name, _ in self.headers}
            self.complete |= bool(self.status) and not keys & {b"content-length", b"transfer-encoding"}
            self._broken = True

    def take(self) -> bytes:
        """Everything that has arrived of the body."""
        data = b"".join(self._chunks)
        self._chunks.clear()
        return data

    def close(self) -> None:
        self._broken = True
        self.writer.transport.abort()


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
        while not (part := connection.take()):
            if connection.complete:
                return None
            if connection.lost:
                raise UpstreamError("it broke off within an answer")
            await connection.receive()
        return part

    @property
    def finished(self) -> bool:
        """Whether nothing more will come after what `next` gave: the last bytes and the end can go in one write."""
        return self._connection.complete

    def release(self) -> None:
        """Give the connection back, or close it when the answer was not read to its end (the server then stops)."""
        self._owner._give_back(self._connection)


class Upstream:
    """The server behind the Unix socket `path`, and the connections to it that are idle."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._idle: deque[_Connection] = deque()

    async def request(self, method: bytes, target: bytes, headers: Headers, body: bytes = b"") -> Reply:
        """Send a request; return when the head of the answer is there.

        `headers` come without hop-by-hop ones, Host and Content-Length; `target` is what the client sent.

        Raises:
            UpstreamError: the server is not there, or broke off before it answered.
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
                    raise UpstreamError("it broke off before it answered")
                await connection.receive()
        except BaseException:
            connection.close()
            raise
        return Reply(self, connection)

    async def fetch(self, method: bytes, target: bytes, headers: Headers, body: bytes = b"") -> tuple[int, bytes]:
        """Status and whole body of an answer. Raises as `request` and `Reply.next`."""
        reply, parts = await self.request(method, target, headers, body), []
        try:
            while (part := await reply.next()) is not None:
                parts.append(part)
            return reply.status, b"".join(parts)
        finally:
            reply.release()

    async def get(self, target: bytes, timeout_s: float) -> bytes | None:
        """The body of what a GET is answered with; None where that is no 200, or does not come in time."""
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
        while self._idle:
            connection = self._idle.pop()
            if not connection.lost and asyncio.get_running_loop().time() - connection.used < _IDLE_S:
                return connection
            connection.close()
        try:
            return _Connection(*await asyncio.open_unix_connection(str(self.path), limit=_BUFFERED_BYTES))
        except OSError as error:
            raise UpstreamError(f"it does not listen: {error.strerror}") from error

    def _give_back(self, connection: _Connection) -> None:
        if connection.complete and connection.keep and not connection.lost and not connection.head_only:
            connection.used = asyncio.get_running_loop().time()
            self._idle.append(connection)
        else:
            connection.close()
