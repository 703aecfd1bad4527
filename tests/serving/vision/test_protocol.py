"""The Open Inference Protocol through Triton's own client, the OpenAPI document, and Prometheus' own parser."""

from __future__ import annotations

import gzip

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from prometheus_client.parser import text_string_to_metric_families

from exporters.graph.runtime import open_session


@pytest.fixture
def client(server):
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as found:
        yield found


def _pixels(client, count):
    shape = client.get_model_metadata("tiny")["inputs"][0]["shape"]
    return np.random.default_rng(2).standard_normal((count, *shape[1:]), dtype=np.float32)


def test_health_and_metadata(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    assert client.get_model_metadata("tiny")["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, 5]}]


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
def test_infer_gives_the_bits_of_the_direct_run(client, export, binary_in, binary_out):
    pixels = _pixels(client, 3)
    tensor = triton.InferInput("pixels", list(pixels.shape), "FP32")
    tensor.set_data_from_numpy(pixels, binary_data=binary_in)
    outputs = None if binary_out is None else [triton.InferRequestedOutput("logits", binary_data=binary_out)]
    answer = client.infer("tiny", [tensor], outputs=outputs, request_id="seven")
    session = open_session(export / "model.onnx")
    alone = np.concatenate([session.run(None, {"pixels": pixels[i : i + 1]})[0] for i in range(3)])
    assert np.array_equal(answer.as_numpy("logits"), alone)
    assert answer.get_response()["id"] == "seven"


@pytest.mark.parametrize("sent", ["gzip", "deflate", None])
@pytest.mark.parametrize("wanted", ["gzip", "deflate", None])
@pytest.mark.parametrize("binary", [True, False])
def test_compressed_both_ways(client, export, sent, wanted, binary):
    count = 40 if binary else 12  # as JSON a number takes twenty characters
    pixels = _pixels(client, count)
    tensor = triton.InferInput("pixels", list(pixels.shape), "FP32")
    tensor.set_data_from_numpy(pixels, binary_data=binary)
    output = triton.InferRequestedOutput("logits", binary_data=binary)
    answer = client.infer("tiny", [tensor], outputs=[output], request_compression_algorithm=sent,
                          response_compression_algorithm=wanted)  # fmt: skip
    session = open_session(export / "model.onnx")
    alone = np.concatenate([session.run(None, {"pixels": pixels[i : i + 1]})[0] for i in range(count)])
    assert np.array_equal(answer.as_numpy("logits"), alone)


def test_an_answer_is_compressed_when_that_was_asked_for(server, client):
    shape = [40, *_pixels(client, 1).shape[1:]]
    body = {"inputs": [{"name": "pixels", "datatype": "FP32", "shape": shape, "data": [0.5] * int(np.prod(shape))}]}
    for wanted, found in (("gzip", "gzip"), ("deflate;q=0.5, br", "deflate"), ("identity", None)):
        answer = httpx.post(f"{server.url}/v2/models/tiny/infer", json=body, headers={"Accept-Encoding": wanted})
        assert answer.headers.get("content-encoding") == found
        assert answer.json()["outputs"][0]["shape"] == [40, 5]
        assert answer.headers["vary"] == "Accept-Encoding"


def test_a_compressed_body_stays_within_the_limit(server):
    url, bomb = f"{server.url}/v2/models/tiny/infer", gzip.compress(bytes(2_000_001))
    assert len(bomb) < 5000
    answer = httpx.post(url, content=bomb, headers={"Content-Encoding": "gzip"})
    assert (answer.status_code, answer.json()["problem"]["code"]) == (413, "body_too_large")
    answer = httpx.post(url, content=b"{}", headers={"Content-Encoding": "gzip"})
    assert (answer.status_code, answer.json()["problem"]["code"]) == (400, "damaged_body")
    answer = httpx.post(url, content=b"{}", headers={"Content-Encoding": "br"})
    assert (answer.status_code, answer.json()["problem"]["code"]) == (415, "unsupported_encoding")


def test_what_does_not_fit_is_the_clients_exception(client):
    tensor = triton.InferInput("pixels", [1, 3, 5, 5], "FP32")
    tensor.set_data_from_numpy(np.zeros((1, 3, 5, 5), np.float32))
    with pytest.raises(triton.InferenceServerException, match="shape"):
        client.infer("tiny", [tensor])


def test_metrics_are_read_by_prometheus_own_parser(server, client):
    httpx.post(f"{server.url}/v1/classify", content=b"x", headers={"Content-Type": "image/png"})
    tensor = triton.InferInput("pixels", [1, *_pixels(client, 1).shape[1:]], "FP32")
    tensor.set_data_from_numpy(_pixels(client, 1))
    client.infer("tiny", [tensor])
    found = {family.name: family for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)}
    assert {"fp8pipe_requests", "fp8pipe_stage_seconds", "fp8pipe_queue_depth", "fp8pipe_batch_size",
            "fp8pipe_decode_errors", "fp8pipe_artifact_info"} <= set(found)  # fmt: skip
    samples = {(s.name, s.labels.get("stage")): s.value for s in found["fp8pipe_stage_seconds"].samples}
    assert samples["fp8pipe_stage_seconds_count", "inference"] > 0
    refused = {s.labels["code"]: s.value for s in found["fp8pipe_decode_errors"].samples if s.name.endswith("total")}
    assert refused["not_an_image"] > 0


def test_the_openapi_document_holds_against_schemathesis(server):
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis.checks import CHECKS

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    tried = []
    failing = CHECKS.get_one("not_a_server_error")
    for operation in (result.ok() for result in schema.get_all_operations()):

        @settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        @given(case=operation.as_strategy())
        def call(case):
            case.call_and_validate(checks=(failing,), timeout=60)

        call()
        tried.append(operation.path)
    assert "/v1/classify" in tried
