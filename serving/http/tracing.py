"""OpenTelemetry, where its own variables name a collector: a span a request, in the trace that the client began.

`OTEL_EXPORTER_OTLP_ENDPOINT` (or `..._TRACES_ENDPOINT`) turns it on, `OTEL_SDK_DISABLED=true` off; the extra
`tracing` has the packages. A program that has set up a tracer provider already, such as `opentelemetry-instrument`,
keeps its own.
"""

from __future__ import annotations

import logging
import os
from typing import Any, Final

__all__ = ["traced", "with_spans"]

logger = logging.getLogger(__name__)

_SWITCHES: Final = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
# Probes and scrapes come every few seconds and tell nothing.
_UNTRACED: Final = "/healthz$,/readyz$,/metrics$,/v2/health/"
_NAME: Final = "fp8pipe"


def traced(app: Any) -> Any:
    """`app` with spans where the environment asks for them; a warning where they are asked for and cannot be."""
    if not any(os.environ.get(name) for name in _SWITCHES) or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return app
    try:
        return with_spans(app, _provider())
    except ImportError as error:
        logger.warning("a collector is configured, but nothing is traced: %s; pip install 'fp8pipe[tracing]'", error)
        return app


def with_spans(app: Any, provider: Any) -> Any:
    """`app` in OpenTelemetry's middleware; `provider` is an `opentelemetry.trace.TracerProvider`."""
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware

    return OpenTelemetryMiddleware(
        app, excluded_urls=_UNTRACED, tracer_provider=provider, exclude_spans=["receive", "send"]
    )


def _provider() -> Any:
    """The process's own tracer provider, or one that sends to the collector; it is flushed when the process ends."""
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    present = trace.get_tracer_provider()
    if isinstance(present, TracerProvider):
        return present
    # Resource.create reads OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES; a name given here would win over them.
    named = "OTEL_SERVICE_NAME" in os.environ or "service.name" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    provider = TracerProvider(resource=Resource.create({} if named else {SERVICE_NAME: _NAME}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider
