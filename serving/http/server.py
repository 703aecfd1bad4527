"""Runs an app until it is told to stop, and stops without losing a request.

On SIGTERM (or SIGINT) readiness turns 503 at once, so that a balancer looks elsewhere; for `linger_s` requests are
still taken, each answered with `Connection: close`; then the listener closes, what was accepted is finished, and the
process ends with 0. A second signal ends it at once. SIGHUP reads the API keys again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from serving.http.config import ServeConfig
from serving.http.protocol import limited_protocol

__all__ = ["Lifecycle", "Service", "make_server"]

logger = logging.getLogger(__name__)

_ACCEPT_S = 0.2  # for connections that the kernel has taken already


@dataclass
class Lifecycle:
    """Whether the service takes requests."""

    ready: bool = False  # everything is loaded
    draining: bool = False  # SIGTERM has come
    on_drain: list[Callable[[], None]] = field(default_factory=list)  # called once when draining begins
    leave: Callable[[], None] = lambda: None  # ends the service at once; set by `make_server`

    @property
    def accepting(self) -> bool:
        """What /readyz says."""
        return self.ready and not self.draining

    def drain(self) -> None:
        """Begin to drain."""
        if not self.draining:
            self.draining = True
            for call in self.on_drain:
                call()


class Service(uvicorn.Server):
    """A server whose first signal drains and whose second stops."""

    def __init__(
        self, config: uvicorn.Config, lifecycle: Lifecycle, linger_s: float, reload: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self.lifecycle, self.linger_s, self._reload = lifecycle, linger_s, reload
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: Any = None) -> None:
        """As uvicorn does; then says where it listens, on stderr."""
        self._loop = asyncio.get_running_loop()
        if hasattr(signal, "SIGHUP"):
            try:
                self._loop.add_signal_handler(signal.SIGHUP, self._reload)
            except (RuntimeError, ValueError):  # not in the main thread
                logger.debug("SIGHUP is not handled outside the main thread")
        await super().startup(sockets)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        print(f"serving on http://{shown}:{port}", file=sys.stderr, flush=True)

    async def shutdown(self, sockets: Any = None) -> None:
        """As uvicorn does, after the connections that the kernel has taken were accepted: closing resets them."""
        for server in self.servers:
            for taken in server.sockets:
                with socket.socket(fileno=os.dup(taken.fileno())) as listener:
                    listener.listen(0)  # no new ones
        await asyncio.sleep(_ACCEPT_S)
        await super().shutdown(sockets)

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self.servers[0].sockets[0].getsockname()[1])

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Drain at the first signal; leave at once at the second. The signal is not raised again: the end is 0."""
        if self.lifecycle.draining:
            self.force_exit = self.should_exit = True
            return
        self.lifecycle.drain()
        if self._loop is None or self.linger_s == 0:
            self.leave()
        else:
            self._loop.call_soon_threadsafe(self._loop.call_later, self.linger_s, self.leave)

    def leave(self) -> None:
        """Finish what was accepted, then end."""
        self.should_exit = True


def make_server(
    app: Any, config: ServeConfig, lifecycle: Lifecycle, *, reload: Callable[[], None] = lambda: None,
    drain_s: float | None = None,
) -> Service:  # fmt: skip
    """A server for `app`, not yet running; see `serve`. `reload` is called on SIGHUP."""
    drain_s = config.request_timeout_s + config.body_timeout_s if drain_s is None else drain_s
    settings = uvicorn.Config(
        app, host=config.host, port=config.port, log_config=None, access_log=False, server_header=False,
        timeout_keep_alive=max(1, round(config.keep_alive_s)), lifespan="on", ws="none", proxy_headers=False,
        http=limited_protocol(config.header_timeout_s, config.max_connections),
        timeout_graceful_shutdown=max(1, round(drain_s)),
    )  # fmt: skip
    service = Service(settings, lifecycle, config.linger_s, reload)
    lifecycle.leave = service.leave
    return service
