"""Random raw requests: valid ones with bytes changed, cut off, repeated, or under other headers."""

from __future__ import annotations

import io
import json
import random
import socket
from collections import Counter

import numpy as np
from PIL import Image

_TYPES = ("image/png", "image/jpeg", "application/json", "multipart/form-data; boundary=b", "text/plain", "",
          "application/octet-stream", "multipart/form-data", "application/json; charset=utf-16")  # fmt: skip
_PATHS = ("/v1/classify", "/v1/classify?top_k=3", "/v1/embed", "/v2/models/tiny/infer", "/v2/models/x/infer", "/v2",
          "/v1/classify?top_k=%ff", "/metrics", "/%00", "/v2/models/%2e%2e/ready", "/")  # fmt: skip
_JSON = ('{"image": "aGVsbG8="}', '{"images": [1, null]}', "[" * 5000, '{"top_k": 1e999}', '{"image": "\\ud800"}',
         '{"inputs": [{"name": "pixels", "datatype": "FP32", "shape": [1, 3, 24, 24], "data": [1]}]}',
         json.dumps({"inputs": [{"name": "pixels", "shape": [10**40], "datatype": "FP32"}]}))  # fmt: skip


def _seeds() -> list[bytes]:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    found = []
    for format in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"):
        stream = io.BytesIO()
        image.save(stream, format)
        found.append(stream.getvalue())
    part = b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n' + found[0] + b"\r\n--b--\r\n"
    return [*found, part, *(text.encode() for text in _JSON)]


def _changed(data: bytes, chance: random.Random) -> bytes:
    body = bytearray(data)
    for _ in range(chance.choice((0, 1, 4, 32))):
        if body:
            body[chance.randrange(len(body))] = chance.randrange(256)
    if chance.random() < 0.3:
        del body[chance.randrange(len(body) + 1) :]
    return bytes(body)


def _request(seeds: list[bytes], chance: random.Random) -> bytes:
    body = _changed(chance.choice(seeds), chance)
    length = len(body) if chance.random() < 0.95 else chance.choice((0, -1, 10**30))
    extra = f"Inference-Header-Content-Length: {chance.choice((0, 5, 10**9, 'x'))}\r\n" if chance.random() < 0.1 else ""
    head = (
        f"{chance.choice(('POST', 'POST', 'POST', 'GET', 'PUT', 'FOO'))} {chance.choice(_PATHS)} HTTP/1.1\r\n"
        f"Host: x\r\nConnection: close\r\nContent-Type: {chance.choice(_TYPES)}\r\n{extra}"
        f"Content-Length: {length}\r\n\r\n"
    ).encode()
    if chance.random() < 0.05:
        head = _changed(head, chance)
    return head + body


def fuzz(port: int, count: int, chance: random.Random) -> Counter[int]:
    """Send `count` requests one by one; how often which status came (0: the connection was closed)."""
    seeds, statuses = _seeds(), Counter[int]()
    for _ in range(count):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            try:
                connection.sendall(_request(seeds, chance))
                connection.shutdown(socket.SHUT_WR)
                head = connection.recv(4096)
                while connection.recv(65536):
                    pass
            except ConnectionError:
                head = b""
        statuses[int(head[9:12]) if head.startswith(b"HTTP/1.1 ") else 0] += 1
    return statuses
