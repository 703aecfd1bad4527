"""OpenTelemetry, where its SDK is installed and configured by its own variables: a span a request."""

from __future__ import annotations

import os
from typing import Any

__all__ = ["traced"]


def traced(app: Any) -> Any:
    """`app` inside OpenTelemetry's middleware when an exporter is configured and the package is there."""
    if not any(name.startswith("OTEL_EXPORTER_OTLP") for name in os.environ):
        return app
    try:
        from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
    except ImportError:
        return app
    return OpenTelemetryMiddleware(app)
