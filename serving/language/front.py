"""The proxy that clients connect to: it forwards requests to vLLM, and sends proper errors while vLLM is down.

It answers `/`, `/healthz`, `/readyz`, `/metrics` and `/v1/artifact` itself; all other paths go to vLLM. Responses are
streamed as they arrive. When a client disconnects, its request is cancelled in vLLM too. If vLLM fails during a
request, the client gets a 503 with `Retry-After` if nothing has been sent yet, an `error` event in an event stream, and
otherwise a closed connection, so that a partial response is never mistaken for a complete one. Requests that are still
running when the drain period ends are ended in the same way.
"""

from __future__ import annotations

import asyncio
import json
import logging
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastapi.responses import HTMLResponse, JSONResponse, Response

from serving.http.problems import Problem, Receive, Scope, Send, send_problem
from serving.http.server import Lifecycle
from serving.http.service import page_headers
from serving.http.telemetry import HttpMetrics
from serving.language.supervisor import State, Supervisor
from serving.language.upstream import Headers, Reply, UpstreamError

logger = logging.getLogger(__name__)

_PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
_HOP = {b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade"}
# Headers that are not forwarded, to vLLM (`_NOT_UP`) and to the client (`_NOT_DOWN`). API keys are checked before
# requests reach the proxy and are not passed on; request ids are set by this service in both directions.
_NOT_UP = _HOP | {b"host", b"content-length", b"expect", b"authorization", b"x-api-key", b"x-request-id"}
_NOT_DOWN = _HOP | {b"date", b"server", b"x-request-id"}
_SHUTTING_DOWN = ("shutting_down", "the server is shutting down")
# Possible values of the metric label `route`: text from a client must never become a label.
_ROUTES = frozenset(
    f"/v1/{name}" for name in ("chat/completions", "completions", "models", "embeddings", "responses", "artifact")
) | {"/", "/healthz", "/readyz", "/metrics", "/tokenize", "/detokenize", "/version", "/health"}


class Front:
    """The ASGI app of the proxy.

    Args:
        supervisor: the supervisor of vLLM, whose `upstream` requests are forwarded to.
        lifecycle: the lifecycle of the service.
        metrics: the service's own metrics; `/metrics` shows them before vLLM's.
        identity: the response of `/v1/artifact`.
        run: digests of how vLLM runs, for further nodes, see `sameness`.
        with_page: whether to serve the web page at `/`.
        timeout_s: longest wait for the headers of a response, seconds; None waits as long as the client does.
    """

    def __init__(
        self, supervisor: Supervisor, lifecycle: Lifecycle, metrics: HttpMetrics, identity: dict[str, Any], *,
        run: dict[str, str], with_page: bool = True, timeout_s: float | None = None,
    ) -> None:  # fmt: skip
        self.supervisor, self.lifecycle, self.metrics, self.identity = supervisor, lifecycle, metrics, identity
        self.run, self.timeout_s = run, timeout_s
        page = _PAGE.replace("@MODEL@", escape(supervisor.model)).replace("@DIGEST@", escape(identity["digest"]))
        self._page = (page, page_headers(page)) if with_page else None
        self._running: set[asyncio.Task[Any]] = set()
        self._ending = False

    def end_after_drain(self, longest_s: float) -> None:
        """End requests that are still running `longest_s` seconds after draining began. Call it in the event loop."""
        loop = asyncio.get_running_loop()

        # Draining is started by a signal handler, which runs outside the event loop.
        def drain() -> None:
            loop.call_soon_threadsafe(loop.call_later, longest_s, self._end)

        self.lifecycle.on_drain.append(drain)

    def _end(self) -> None:
        self._ending = True
        if self._running:
            logger.warning("the drain period is over: cancelling %d running requests", len(self._running))
        for task in self._running:
            task.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface."""
        path = scope["path"]
        scope["route"] = SimpleNamespace(path=path if path in _ROUTES else "other")
        try:
            own = await self._own(path) if scope["method"] in ("GET", "HEAD") else None
            if own is not None:
                await own(scope, receive, send)
            else:
                await self._pass(scope, receive, send)
        except Problem as problem:
            await send_problem(problem, scope, receive, send)

    async def _own(self, path: str) -> Response | None:
        # The response of a path that the proxy answers itself; None for all others.
        if path == "/" and self._page is not None:
            return HTMLResponse(self._page[0], headers=self._page[1])
        if path == "/healthz":
            return JSONResponse({"status": "alive"})
        if path == "/readyz":
            ready = self.supervisor.state is State.READY and not self.lifecycle.draining
            state = "draining" if self.lifecycle.draining else self.supervisor.state.value
            document = {"status": state, "start": self.supervisor.start_id, "run": self.run}
            retry = {"Retry-After": str(self.supervisor.retry_after_s)}
            return JSONResponse(document) if ready else JSONResponse(document, 503, retry)
        if path == "/v1/artifact":
            return JSONResponse(self.identity)
        if path == "/metrics":
            up = self.supervisor.state is State.READY
            engine = await self.supervisor.upstream.get(b"/metrics", 5) if up else None
            return Response(self.metrics.text() + (engine or b""), media_type=self.metrics.content_type)
        return None

    def _away(self) -> Problem:
        """The problem (503) that a client gets while vLLM is starting or being restarted."""
        state = self.supervisor.state
        what = "the model is being loaded" if state is State.STARTING else "the model is being restarted"
        fix = "send the request again after the number of seconds in Retry-After"
        return Problem(503, "engine_unavailable", what, fix, {"Retry-After": str(self.supervisor.retry_after_s)})

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward one request to vLLM."""
        body = await _body(receive)
        if body is None:
            return
        if self.supervisor.state is not State.READY:
            raise self._away()
        task = asyncio.current_task()
        gone = asyncio.ensure_future(receive())  # completes when the client disconnects
        assert task is not None
        gone.add_done_callback(lambda future: None if future.cancelled() else task.cancel())
        self._running.add(task)
        try:
            await self._exchange(scope, body, send)
        except asyncio.CancelledError:
            left = gone.done() and not gone.cancelled()
            if not left and not self._ending:
                raise
            task.uncancel()
            if not left:  # the drain is over, and nothing has been sent yet
                raise Problem(503, *_SHUTTING_DOWN, "send the request again", {"Retry-After": "5"}) from None
        finally:
            self._running.discard(task)
            gone.cancel()

    async def _exchange(self, scope: Scope, body: bytes, send: Send) -> None:
        # Send a request to vLLM, and its response to the client.
        target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        headers: Headers = [item for item in scope["headers"] if item[0] not in _NOT_UP]
        headers.append((b"x-request-id", scope["state"]["request_id"].encode()))
        try:
            async with asyncio.timeout(self.timeout_s):
                reply = await self.supervisor.upstream.request(scope["method"].encode(), target, headers, body)
        except TimeoutError:
            what = f"the model did not answer within {self.timeout_s:g} s"
            raise Problem(504, "engine_timeout", what, "ask for fewer tokens, or for a stream") from None
        except UpstreamError as error:
            logger.warning("request %s: vLLM %s", scope["state"]["request_id"], error)
            await self.supervisor.suspect()
            raise self._away() from error
        try:
            # When the engine has died, vLLM's server answers 500; the client gets a 503 instead, so that it retries.
            if reply.status >= 500 and not await self.supervisor.suspect():
                raise self._away()
            await self._stream(reply, send)
        finally:
            reply.release()

    async def _stream(self, reply: Reply, send: Send) -> None:
        # Pass a response on as it arrives; if it breaks off, end it so that the client notices.
        headers = [item for item in reply.headers if item[0] not in _NOT_DOWN]
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        code, message = "engine_unavailable", "the model stopped in the middle of its answer"
        try:
            while (part := await reply.next()) is not None:
                last = reply.finished
                await send({"type": "http.response.body", "body": part, "more_body": not last})
                if last:
                    return
        except UpstreamError:
            await self.supervisor.suspect()
        except asyncio.CancelledError:
            if not self._ending:
                raise
            code, message = _SHUTTING_DOWN
        else:
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        if any(n == b"content-type" and v.startswith(b"text/event-stream") for n, v in reply.headers):
            error = {"code": code, "message": message, "type": code}
            event = b"\n\ndata: " + json.dumps({"error": error}).encode() + b"\n\n"
            await send({"type": "http.response.body", "body": event, "more_body": False})
        # Otherwise the response remains incomplete, and the connection is closed.


async def _body(receive: Receive) -> bytes | None:
    """Read the complete body of a request; None if the client disconnected before it was complete."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)
