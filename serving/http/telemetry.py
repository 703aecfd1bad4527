"""Telemetry for operators: Prometheus metrics, one JSON log line per request on stderr, and OpenTelemetry spans.

A client's `X-Request-Id` is kept if it is well formed (at most 64 letters, digits, `.`, `_` or `-`), so that one id
follows a request through several services; otherwise a new one is generated. Bodies, keys and query strings are never
logged. A separate thread writes the log lines, so that a full pipe cannot block the service.

Spans are exported if the standard OpenTelemetry variables name a collector: one span per request, in the client's
trace. `OTEL_EXPORTER_OTLP_ENDPOINT` (or `..._TRACES_ENDPOINT`) enables them, `OTEL_SDK_DISABLED=true` disables them;
the extra `tracing` installs the packages. If a tracer provider is already set up, for example by
`opentelemetry-instrument`, it is used.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from logging.handlers import QueueHandler, QueueListener
from queue import Full, Queue
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from serving.http.problems import Receive, Scope, Send

logger = logging.getLogger(__name__)

LATENCY_BUCKETS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_METHODS: Final = frozenset(("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"))
_SANE_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_MAX_LOGGED_PATH: Final = 200
_MAX_PENDING_LINES: Final = 10_000
_STATUS_CLIENT_LEFT: Final = 499  # logged if the client disconnected before a response was sent
_TRACING_VARIABLES: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
# Health probes and metric scrapes come every few seconds, and traces of them are useless.
_UNTRACED_URLS: Final = "/healthz$,/readyz$,/metrics$,/v2/health/"


class HttpMetrics:
    """Prometheus metrics common to all services: requests, and the artifact served. Each instance has its own registry.

    Attributes:
        registry: where a service registers further metrics.
        content_type: content type of `text`.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = at = CollectorRegistry()
        self.requests = Counter("fp8pipe_requests", "Requests answered.", ("route", "method", "status"), registry=at)
        self.latency = Histogram(
            "fp8pipe_request_seconds", "Time from the first byte of a request to the last of its response.", ("route",),
            buckets=LATENCY_BUCKETS_S, registry=at,
        )  # fmt: skip
        self.held_bytes = Gauge("fp8pipe_held_body_bytes", "Size of the request bodies in memory.", registry=at)
        self.in_drain = Gauge("fp8pipe_draining", "1 while draining, after SIGTERM.", registry=at)

    def observe(self, route: str, method: str, status: int, took_s: float) -> None:
        """Count one request, which took `took_s` seconds.

        `route` must be a route template and never text from a client, because every new label value stays in memory.
        """
        self.requests.labels(route, method if method in _METHODS else "other", str(status)).inc()
        self.latency.labels(route).observe(took_s)

    def identify(self, labels: Mapping[str, str]) -> None:
        """Publish the served artifact as the metric `fp8pipe_artifact_info`, described by these labels."""
        Gauge("fp8pipe_artifact_info", "The artifact that is served.", list(labels), registry=self.registry).labels(
            **labels
        ).set(1)

    def text(self) -> bytes:
        """All metrics in Prometheus text format."""
        return generate_latest(self.registry)


class _DroppingHandler(QueueHandler):
    """Drops log lines when the queue is full, rather than delaying requests."""

    def enqueue(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Full):
            self.queue.put_nowait(record)


@contextlib.contextmanager
def access_log(enabled: bool) -> Iterator[logging.Logger]:
    """A context that provides the access logger, whose lines a thread writes to stderr until the context ends.

    If not `enabled`, the logger discards all lines.
    """
    lines = logging.getLogger("fp8pipe_access")
    lines.propagate, lines.handlers = False, []
    lines.setLevel(logging.INFO if enabled else logging.CRITICAL)
    if not enabled:
        yield lines
        return
    writer = logging.StreamHandler(sys.stderr)
    writer.setFormatter(logging.Formatter("%(message)s"))
    queue: Queue[Any] = Queue(_MAX_PENDING_LINES)
    lines.addHandler(_DroppingHandler(queue))
    listener = QueueListener(queue, writer)
    listener.start()
    try:
        yield lines
    finally:
        listener.stop()


class TelemetryMiddleware:
    """The outermost middleware: request ids, access log, request metrics, and additional response headers.

    Args:
        app: the wrapped ASGI app.
        lines: the access logger.
        metrics: the metrics to update.
        headers: called for each response; returns the (name, value) pairs of bytes to add to it.
    """

    def __init__(self, app: Any, lines: logging.Logger, metrics: HttpMetrics, headers: Any) -> None:
        self.app, self.lines, self.metrics, self.headers = app, lines, metrics, headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface."""
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        started, status, sent = time.perf_counter(), _STATUS_CLIENT_LEFT, 0

        async def noting(message: Any) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                own = (b"x-request-id", request_id.encode())
                message["headers"] = [*message.get("headers", ()), own, *self.headers()]
            elif message["type"] == "http.response.body":
                sent += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            took_s = time.perf_counter() - started
            route = getattr(scope.get("route"), "path", None) or "other"
            self.metrics.observe(route, scope["method"], status, took_s)
            if self.lines.isEnabledFor(logging.INFO):
                self.lines.info(_line(scope, request_id, status, sent, took_s))


def _line(scope: Scope, request_id: str, status: int, sent: int, took_s: float) -> str:
    return json.dumps({
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"), "request_id": request_id,
        "client": (scope.get("client") or ("",))[0], "key": scope["state"].get("client_name", ""),
        "method": scope["method"], "path": scope["path"][:_MAX_LOGGED_PATH], "status": status,
        "bytes": sent, "ms": round(took_s * 1000, 3),
    })  # fmt: skip


def _request_id(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _SANE_REQUEST_ID.fullmatch(value):
            return str(value, "ascii")
    return secrets.token_hex(8)


def traced(app: Any) -> Any:
    """Add tracing to `app` if the environment enables it; logs a warning if the packages for it are missing."""
    wanted = any(os.environ.get(name) for name in _TRACING_VARIABLES)
    if not wanted or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return app
    try:
        return with_spans(app, _tracer_provider())
    except ImportError as error:
        logger.warning(
            "a tracing collector is configured, but requests are not traced: %s; pip install 'fp8pipe[tracing]'", error
        )
        return app


def with_spans(app: Any, provider: Any) -> Any:
    """Wrap `app` in OpenTelemetry's middleware; `provider` is an `opentelemetry.trace.TracerProvider`."""
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware

    return OpenTelemetryMiddleware(
        app, excluded_urls=_UNTRACED_URLS, tracer_provider=provider, exclude_spans=["receive", "send"]
    )


def _tracer_provider() -> Any:
    """The tracer provider of the process, or a new one that exports to the collector and is flushed at exit."""
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    present = trace.get_tracer_provider()
    if isinstance(present, TracerProvider):
        return present
    # Resource.create reads OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES; a name given here would override them.
    named = "OTEL_SERVICE_NAME" in os.environ or "service.name" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    provider = TracerProvider(resource=Resource.create({} if named else {SERVICE_NAME: "fp8pipe"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
