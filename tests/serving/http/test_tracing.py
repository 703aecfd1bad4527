"""Spans: through OpenTelemetry's own SDK and exporters, in memory and over a socket."""

from __future__ import annotations

import asyncio
import http.server
import signal
import threading

import httpx
import pytest
from running_server import running
from tiny_exports import write_export

pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed")
pytest.importorskip("opentelemetry.instrumentation.asgi", reason="opentelemetry-instrumentation-asgi is not installed")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="its OTLP exporter is not installed")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from serving.http.problems import Problem, send_problem
from serving.http.telemetry import traced, with_spans

_PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def _app(scope, receive, send):
    status = 400 if scope["path"].startswith("/bad") else 200
    await send_problem(Problem(status, "any", "any"), scope, receive, send)


def _call(app, *paths):
    async def calls():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            for path in paths:
                await client.get(path, headers={"traceparent": _PARENT})

    asyncio.run(calls())


def test_a_span_a_request_in_the_clients_trace():
    memory = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    _call(with_spans(_app, provider), "/v1/classify", "/bad", "/healthz", "/readyz", "/metrics", "/v2/health/ready")
    spans = memory.get_finished_spans()
    assert [span.attributes.get("http.status_code") or span.attributes["http.response.status_code"]
            for span in spans] == [200, 400]  # fmt: skip
    assert {format(span.context.trace_id, "032x") for span in spans} == {_PARENT.split("-")[1]}
    assert {format(span.parent.span_id, "016x") for span in spans} == {_PARENT.split("-")[2]}
    assert all("GET" in span.name for span in spans)


def test_nothing_is_traced_unless_asked_for(monkeypatch):
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert traced(_app) is _app
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert traced(_app) is _app


class _Collector(http.server.BaseHTTPRequestHandler):
    """What an OpenTelemetry collector listens for."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append((self.path, ExportTraceServiceRequest.FromString(body)))
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments):
        pass


def test_a_server_sends_its_spans_to_a_collector(tmp_path):
    export = write_export(tmp_path, "timm-vit")
    collector = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Collector)
    collector.received = []
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    variables = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}", "no_proxy": "*"}
    limits = ("--max-batch", "1", "--threads", "1", "--linger-s", "0")
    with running(export, *limits, **variables) as server:
        httpx.get(f"{server.url}/v1/artifact", headers={"traceparent": _PARENT})
        httpx.get(f"{server.url}/healthz")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
    collector.shutdown()
    ((path, sent),) = collector.received
    assert path == "/v1/traces"
    (resource,) = sent.resource_spans
    names = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
    assert names["service.name"] == "fp8pipe"
    ((span,),) = (scope.spans for scope in resource.scope_spans)
    assert span.trace_id.hex() == _PARENT.split("-")[1]
