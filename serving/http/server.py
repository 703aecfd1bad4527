"""Runs an ASGI app until a signal stops it, and shuts down gracefully, without losing a request.

On SIGTERM (or SIGINT) `/readyz` answers 503 at once, so that a load balancer sends requests elsewhere. For `linger_s`
new requests are still accepted and answered with `Connection: close`; then the listener closes, requests in progress
are finished, and the process exits with 0. A second signal stops it at once. SIGHUP reloads the API keys.

The module also adds to uvicorn's HTTP protocol what it lacks: a timeout for headers, a limit on connections, and errors
in JSON. By itself uvicorn waits forever for the headers of a connection's first request, which a slowloris attack
exploits. And it does not answer a client that closes its sending side in the middle of a request, although that client
could still read the response.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
from asyncio import TimerHandle
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, ClassVar

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from serving.config import ServeConfig

logger = logging.getLogger(__name__)

_ACCEPT_S = 0.2  # seconds to accept connections that are already in the kernel's queue
_MAX_HEADER_BYTES = 65_536
# After an error response, seconds until the connection is closed. Closing it at once with unread data would reset it,
# and the client might lose the response.
_LINGER_S = 0.5
# Seconds that idle connections stay open during a shutdown: requests sent before the client notices are still answered.
_LAST_CALL_S = 1.0


@dataclass
class Lifecycle:
    """The state of a service: whether it accepts requests or is draining."""

    ready: bool = False  # everything is loaded
    draining: bool = False  # SIGTERM was received
    on_drain: list[Callable[[], None]] = field(default_factory=list)  # called once when draining begins
    leave: Callable[[], None] = lambda: None  # starts the shutdown, without `linger_s`; set by `Service`

    @property
    def accepting(self) -> bool:
        """Whether /readyz answers 200."""
        return self.ready and not self.draining

    def drain(self) -> None:
        """Start draining, unless it has started already."""
        if not self.draining:
            self.draining = True
            for call in self.on_drain:
                call()


class Service(uvicorn.Server):
    """A uvicorn server for `app` that drains on the first signal and stops at once on the second.

    Args:
        app: the ASGI app, with all middleware.
        config: address, limits and timeouts.
        lifecycle: the state that is shared with the app.
        reload: called on SIGHUP.
        drain_s: longest time for requests in progress after a signal, seconds; by default as long as one request may
            take.
    """

    def __init__(
        self, app: Any, config: ServeConfig, lifecycle: Lifecycle, *, reload: Callable[[], None] = lambda: None,
        drain_s: float | None = None,
    ) -> None:  # fmt: skip
        drain_s = config.request_timeout_s + config.body_timeout_s if drain_s is None else drain_s
        limits = {"header_timeout_s": config.header_timeout_s, "max_connections": config.max_connections}
        super().__init__(uvicorn.Config(
            app, host=config.host, port=config.port, log_config=None, access_log=False, server_header=False,
            timeout_keep_alive=max(1, round(config.keep_alive_s)), lifespan="on", ws="none", proxy_headers=False,
            http=type("LimitedProtocol", (_LimitedProtocol,), limits),
            timeout_graceful_shutdown=max(1, round(drain_s)),
        ))  # fmt: skip
        self.lifecycle, self.linger_s, self._reload = lifecycle, config.linger_s, reload
        lifecycle.leave = self.leave
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: Any = None) -> None:
        """Start as uvicorn does, then print the address to stderr."""
        self._loop = asyncio.get_running_loop()
        try:
            self._loop.add_signal_handler(signal.SIGHUP, self._reload)
        except (RuntimeError, ValueError):
            logger.debug("SIGHUP is not handled outside the main thread")
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"serving on http://{shown}:{port}", file=sys.stderr, flush=True)

    async def shutdown(self, sockets: Any = None) -> None:
        """Accept the connections in the kernel's queue, which closing would reset, then shut down as uvicorn does."""
        for server in self.servers:
            for taken in server.sockets:
                with socket.socket(fileno=os.dup(taken.fileno())) as listener:
                    listener.listen(0)  # queue no new connections
        await asyncio.sleep(_ACCEPT_S)
        await super().shutdown(sockets)

    @property
    def port(self) -> int:
        """The port that the server listens on."""
        return int(self.servers[0].sockets[0].getsockname()[1])

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Drain on the first signal; stop at once on the second. The signal is not raised again: the exit code is 0."""
        if self.lifecycle.draining:
            self.force_exit = self.should_exit = True
            return
        self.lifecycle.drain()
        if self._loop is None or self.linger_s == 0:
            self.leave()
        else:
            self._loop.call_soon_threadsafe(self._loop.call_later, self.linger_s, self.leave)

    def leave(self) -> None:
        """Finish the requests in progress, then exit."""
        self.should_exit = True


class _LimitedProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's protocol for one connection, with the limits added; its base depends on the installed HTTP parser."""

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
        # Let uvicorn parse the data, and limit the size of the headers and the time until they are complete.
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
        # Answer a client that closed its sending side before its request was complete.
        if self._over or self.pipeline:
            return None
        cycle = self.cycle
        in_body = cycle is not None and cycle.more_body and not cycle.response_started
        if not in_body and not self._header_bytes:
            return None  # between requests, or the client disconnected before its response
        self._refuse(400, "cut_off", "the connection ended before the request did")
        return True  # keep the transport open until the response is sent

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
        # Send an error response and close the connection, or only close it while another response is being sent.
        self._disarm()
        self._refused = True
        cycle = self.cycle
        if self.pipeline or (cycle is not None and cycle.response_started and not cycle.response_complete):
            self.transport.close()  # the client would take a response here for that of another request
            return
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True  # the app's response is dropped: nothing can be written after this one
            cycle.message_event.set()
        error = {"code": code, "message": message, "fix": "", "request_id": ""}
        body = json.dumps({"error": error}).encode()
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\n{extra}connection: close\r\n\r\n"
        self.transport.write(head.encode() + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(_LINGER_S, self.transport.close)
