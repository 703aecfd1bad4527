"""Every bad input: a 4xx with a clear JSON error, never a 5xx, never a hang."""

from __future__ import annotations

import io
import json
import socket
import struct
import zlib

import httpx
import numpy as np
import pytest
from PIL import Image

from fp8pipe.models.vision.preprocessing import Preprocessing
from serving.http.problems import Problem
from serving.vision.state import read_image


def _png(image):
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def _header_only(width, height):
    """A PNG that says how large it is and holds next to nothing."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


def _float_tiff():
    stream = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.float32)).save(stream, "TIFF")
    return stream.getvalue()


_PICTURE = _png(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)))
_IMAGES = {
    "empty": (b"", 400), "text": (b"hello", 400), "truncated": (_PICTURE[: len(_PICTURE) // 2], 400),
    "bomb": (_header_only(60_000, 60_000), 413), "beyond the limit": (_header_only(1100, 1000), 413),
    "zero pixels": (_header_only(0, 5), 400),
    "no data": (_header_only(20, 20), 400), "float": (_float_tiff(), 422),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", 400), "svg": (b"<svg/>", 400),
}  # fmt: skip


def _error(answer, status):
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"code", "message", "fix", "request_id"}
    assert error["message"]
    assert error["request_id"] == answer.headers["x-request-id"]
    assert "Traceback" not in answer.text
    assert "/" not in error["message"].replace("multipart/form-data", "").replace("text/plain", "")
    return error["code"]


@pytest.mark.parametrize("name", list(_IMAGES))
def test_images_that_are_none(server, name):
    data, status = _IMAGES[name]
    for kind in ("image/png", "application/octet-stream"):
        answer = httpx.post(f"{server.url}/v1/classify", content=data, headers={"Content-Type": kind})
        _error(answer, status)
    answer = httpx.post(f"{server.url}/v1/classify", files={"image": ("../../etc/passwd", data)})
    _error(answer, status)


@pytest.mark.parametrize(("kind", "body", "status", "code"), [
    ("text/plain", _PICTURE, 415, "unsupported_media_type"),
    ("multipart/form-data", _PICTURE, 400, "invalid_multipart"),
    ("multipart/form-data; boundary=x", b"--x\r\nbroken", 400, None),
    ("application/json", b"[" * 100_000, 400, "invalid_json"),
    ("application/json", b'{"image": "\xff"}', 400, "invalid_json"),
    ("application/json", b'{"image": "!!"}', 400, "invalid_base64"),
    ("application/json", b'{"image": 1' + b"0" * 5000 + b"}", 400, None),
    ("application/json", b"[]", 400, "invalid_json"),
    ("application/json", b"{}", 400, "no_images"),
    ("application/json", b'{"url": "http://localhost"}', 400, "unknown_field"),
    ("application/json", b'{"images": [' + b'"",' * 64 + b'""]}', 413, "too_many_images"),
    ("image/png", b"x" * 2_000_001, 413, "body_too_large"),
])  # fmt: skip
def test_bodies_that_cannot_be_read(server, kind, body, status, code):
    found = _error(httpx.post(f"{server.url}/v1/classify", content=body, headers={"Content-Type": kind}), status)
    assert code in (None, found)


def test_a_hundred_megabytes_are_refused_while_they_stream(server):
    def stream():
        for _ in range(100):
            yield b"x" * 1_000_000

    answer = httpx.post(f"{server.url}/v1/classify", content=stream(), headers={"Content-Type": "image/png"},
                        timeout=60)  # fmt: skip
    assert _error(answer, 413) == "body_too_large"


@pytest.mark.parametrize("top_k", ["0", "-1", "x", "1" * 400, "²", ""])
def test_top_k_is_a_number(server, top_k):
    answer = httpx.post(f"{server.url}/v1/classify", params={"top_k": top_k}, content=_PICTURE,
                        headers={"Content-Type": "image/png"})  # fmt: skip
    assert _error(answer, 400) == "invalid_top_k"


@pytest.mark.parametrize("path", ["/v1/nothing", "/..%2f..%2fetc/passwd", "/v2/models/..%2f..%2fetc", "/page/../x",
                                  "/v2/models/other", "/v2/models/tiny/versions/2", "/%ff%fe"])  # fmt: skip
def test_unknown_places_are_404(server, path):
    answer = httpx.get(f"{server.url}{path}")
    assert answer.status_code == 404
    assert answer.json()["error"]


def _tensor(**changes):
    return {"name": "pixels", "datatype": "FP32", "shape": [1, 3, 24, 32], "data": [0.0]} | changes


def test_tensors_that_do_not_fit(server):
    model = httpx.get(f"{server.url}/v2/models/tiny").json()
    shape = [1, *model["inputs"][0]["shape"][1:]]
    count = int(np.prod(shape))
    good = {"shape": shape, "data": [0.5] * count}
    bad = [
        {"shape": [1, 3, 7, 7]}, {"shape": [0, *shape[1:]]}, {"shape": [-1, *shape[1:]]},
        {"shape": "x"}, {"datatype": "INT8"}, {"datatype": None}, {"name": "x"}, {"data": [0.5] * (count - 1)},
        {"data": ["a"] * count}, {"data": [1e300] * count}, {"data": None}, {"data": [[0.5], [0.5, 1]]},
        {"data": [True] * count}, {"parameters": 5}, {"parameters": {"binary_data_size": 4 * count}},
        {"data": [10**400] * count},
    ]  # fmt: skip
    url = f"{server.url}/v2/models/tiny/infer"
    assert httpx.post(url, json={"inputs": [_tensor(**good)]}).status_code == 200
    for change in bad:
        answer = httpx.post(url, content=json.dumps({"inputs": [_tensor(**(good | change))]}))
        assert answer.status_code == 400, (list(change), answer.text)
        assert isinstance(answer.json()["error"], str)
    nan = json.dumps({"inputs": [_tensor(**good)]}).replace("0.5", "NaN")
    assert httpx.post(url, content=nan).status_code == 400
    for length in ("-1", "x", "9" * 50):
        answer = httpx.post(url, content=b"{}", headers={"Inference-Header-Content-Length": length})
        assert answer.status_code == 400


@pytest.mark.parametrize("size", [(400_000, 1), (1, 400_000)])
@pytest.mark.parametrize("resize", [{"resize": 256}, {"resize": (230, 256), "ratio": "cover"}])
def test_a_strip_is_not_resized_to_a_monster(resize, size):
    recipe = Preprocessing(crop=(224, 224), mean=(0, 0, 0), std=(1, 1, 1), **resize)
    with pytest.raises(Problem) as caught:
        read_image(_header_only(*size), recipe, 1_000_000)
    assert (caught.value.status, caught.value.code) == (413, "image_too_thin")


def test_a_disconnect_half_way_leaves_the_server_well(server):
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(b"POST /v1/classify HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
                               b"Content-Length: 1000\r\n\r\nabc")  # fmt: skip
    assert httpx.get(f"{server.url}/readyz").status_code == 200


def test_random_requests_are_never_the_servers_fault(server):
    """A small run of what `benchmarks/fuzz_vision.py` does 20,000 times."""
    from fuzz_requests import fuzz

    outcome = fuzz(server.port, 300, 0, httpx.get(f"{server.url}/v2/models/tiny").json())
    assert sum(outcome.statuses.values()) == 300
    assert outcome.statuses[200] > 20
    assert not [status for status in outcome.statuses if status >= 500]
    assert outcome.unanswered == outcome.broken == []
    assert httpx.get(f"{server.url}/readyz").status_code == 200


def test_a_wrong_method_is_told_the_right_ones(server):
    answer = httpx.put(f"{server.url}/v1/classify", content=b"")
    assert answer.status_code == 405
    assert answer.headers["Allow"] == "POST"
    assert "Allow" in answer.json()["error"]["fix"]
