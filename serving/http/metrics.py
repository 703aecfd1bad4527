"""What Prometheus reads. One registry a service, so that two in a process do not mix."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

__all__ = ["LATENCY_BUCKETS_S", "HttpMetrics"]

LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_METHODS = frozenset(("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"))


class HttpMetrics:
    """Requests of any service, and which artifact it serves.

    Attributes:
        registry: where a service adds its own.
        content_type: of `text`.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "fp8pipe_requests", "Requests answered.", ("route", "method", "status"), registry=self.registry
        )
        self.latency = Histogram(
            "fp8pipe_request_seconds", "From the first byte of a request to the last of its answer.", ("route",),
            buckets=LATENCY_BUCKETS_S, registry=self.registry,
        )  # fmt: skip
        self.held_bytes = Gauge("fp8pipe_held_body_bytes", "Bodies of requests in memory.", registry=self.registry)
        self.in_drain = Gauge("fp8pipe_draining", "1 after SIGTERM.", registry=self.registry)

    def observe(self, route: str, method: str, status: int, took_s: float) -> None:
        """Count one request. `route` must be a template, never a client's text: labels are kept for ever."""
        self.requests.labels(route, method if method in _METHODS else "other", str(status)).inc()
        self.latency.labels(route).observe(took_s)

    def identify(self, labels: Mapping[str, str]) -> None:
        """Say which artifact is served."""
        Gauge("fp8pipe_artifact_info", "What is served.", list(labels), registry=self.registry).labels(**labels).set(1)

    def text(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self.registry)
