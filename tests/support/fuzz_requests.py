"""Random raw requests: valid ones with bytes changed, cut off or repeated, under right and wrong headers.

Every request must be answered, whatever it is. One that the server may still be waiting for (its body is shorter than
it says, its head never ends) is ended by closing this side of the connection, which must be answered, too.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import random
import re
import socket
import threading
import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

_TYPES = ("image/png", "image/jpeg", "application/json", "multipart/form-data; boundary=b", "text/plain", "",
          "application/octet-stream", "multipart/form-data", "application/json; charset=utf-16",
          'multipart/form-data; boundary="b"', "multipart/form-data; boundary=" + "b" * 300)  # fmt: skip
_PATHS = ("/v1/classify", "/v1/classify?top_k=3", "/v1/embed", "/v2/models/x/infer", "/v2", "/v1/classify?top_k=%ff",
          "/metrics", "/%00", "/v2/models/%2e%2e/ready", "/", "/v1/artifact", "*", "http://x/v1/classify",
          "/" + "a" * 5000)  # fmt: skip
_METHODS = ("POST",) * 60 + ("GET", "PUT", "HEAD", "OPTIONS", "DELETE", "CONNECT", "FOO", "post")
_EXTRA = ("Expect: 100-continue", "Upgrade: websocket\r\nConnection: Upgrade", "Content-Encoding: gzip",
          "Content-Encoding: deflate", "Content-Encoding: br", "Accept-Encoding: gzip, deflate", "Content-Length: 5",
          "Transfer-Encoding: chunked", "Transfer-Encoding: gzip", "X-Long: " + "a" * 70_000, "X-Request-Id: \x01\xff",
          "Authorization: Bearer x", "Range: bytes=0-", "Host: y", ": none", "No colon", " folded: x",
          "Inference-Header-Content-Length: 0", "Inference-Header-Content-Length: 5",
          "Inference-Header-Content-Length: 1000000000", "Inference-Header-Content-Length: x")  # fmt: skip
_JSON = ('{"image": "aGVsbG8="}', '{"images": [1, null]}', "[" * 5000, '{"top_k": 1e999}', '{"image": "\\ud800"}',
         json.dumps({"inputs": [{"name": "pixels", "shape": [10**40], "datatype": "FP32"}]}))  # fmt: skip
# For a request that the server may be waiting for, how long before this side is closed.
_PATIENCE_S = 2.0


@dataclass
class Outcome:
    """What came back.

    Attributes:
        statuses: how often which.
        unanswered: requests without an answer.
        broken: requests whose answer was no whole HTTP message, or an error without its JSON.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    unanswered: list[bytes] = field(default_factory=list)
    broken: list[bytes] = field(default_factory=list)


@dataclass(frozen=True)
class _Seed:
    path: str
    kind: str
    body: bytes
    headers: str = ""


def fuzz(port: int, count: int, seed: int, model: dict[str, Any], clients: int = 4) -> Outcome:
    """Send `count` requests from several connections at once.

    Args:
        port: of the server on this machine.
        count: how many.
        seed: of everything random.
        model: what /v2/models/NAME says of the model.
        clients: at once.
    """
    outcome, seeds, lock = Outcome(), _seeds(model), threading.Lock()

    def work(number: int) -> None:
        chance = random.Random(seed * 1000 + number)
        for _ in range(count // clients + (number < count % clients)):
            request, complete = _request(seeds, chance)
            status, whole = _send(port, request, complete)
            with lock:
                outcome.statuses[status] += 1
                if not status:
                    outcome.unanswered.append(request)
                elif not whole:
                    outcome.broken.append(request)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcome


def _seeds(model: dict[str, Any]) -> list[_Seed]:
    """Requests that the server answers with 200, and a few near them."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))
    found = []
    for format in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"):
        stream = io.BytesIO()
        image.save(stream, format)
        found.append(_Seed("/v1/classify", f"image/{format.lower()}", stream.getvalue()))
    png = found[0].body
    part = b'--b\r\nContent-Disposition: form-data; name="image"; filename="x"\r\n\r\n' + png + b"\r\n"
    top_k = b'--b\r\nContent-Disposition: form-data; name="top_k"\r\n\r\n2\r\n'
    found += [_Seed("/v1/classify", "multipart/form-data; boundary=b", body + b"--b--\r\n")
              for body in (part, part * 3, top_k + part)]  # fmt: skip
    found += [_Seed("/v1/classify", "application/json", text.encode()) for text in _JSON]
    found.append(_Seed("/v1/classify", "image/png", gzip.compress(png), "Content-Encoding: gzip\r\n"))
    return found + _tensors(model)


def _tensors(model: dict[str, Any]) -> list[_Seed]:
    path, source = f"/v2/models/{model['name']}/infer", model["inputs"][0]
    found = []
    for count in (1, 3):
        shape = [count, *source["shape"][1:]]
        values = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
        tensor = {"name": source["name"], "datatype": "FP32", "shape": shape}
        text = json.dumps({"inputs": [tensor | {"data": np.round(values.ravel(), 2).tolist()}]}).encode()
        head = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": values.nbytes}}],
                           "parameters": {"binary_data_output": True}}).encode()  # fmt: skip
        length, binary = f"Inference-Header-Content-Length: {len(head)}\r\n", head + values.tobytes()
        found += [
            _Seed(path, "application/json", text),
            _Seed(path, "application/octet-stream", binary, length),
            _Seed(path, "application/octet-stream", zlib.compress(binary), f"{length}Content-Encoding: deflate\r\n"),
        ]
    return found


def _changed(data: bytes, chance: random.Random) -> bytes:
    body = bytearray(data)
    for _ in range(chance.choice((0, 0, 1, 4, 32))):
        if body:
            body[chance.randrange(len(body))] = chance.randrange(256)
    if chance.random() < 0.2:
        del body[chance.randrange(len(body) + 1) :]
    if chance.random() < 0.05:
        at, end = sorted(chance.randrange(len(body) + 1) for _ in range(2))
        body[at:at] = body[at:end]
    return bytes(body)


def _request(seeds: list[_Seed], chance: random.Random) -> tuple[bytes, bool]:
    """(the bytes, whether the server has all that it was told to expect)."""
    seed = chance.choice(seeds)
    body = _changed(seed.body, chance)
    path = seed.path if chance.random() < 0.8 else chance.choice(_PATHS)
    kind = seed.kind if chance.random() < 0.8 else chance.choice(_TYPES)
    length = len(body) if chance.random() < 0.95 else chance.choice((0, -1, 10**30, len(body) + 5, "x", 3))
    extra = f"{chance.choice(_EXTRA)}\r\n" if chance.random() < 0.15 else ""
    head = (
        f"{chance.choice(_METHODS)} {path} HTTP/1.{chance.choice('1111110')}\r\nHost: x\r\nConnection: close\r\n"
        f"Content-Type: {kind}\r\n{seed.headers}{extra}Content-Length: {length}\r\n\r\n"
    ).encode("latin-1")
    if chance.random() < 0.05:
        head = _changed(head, chance)
    return head + body, not (isinstance(length, int) and length > len(body))


def _send(port: int, request: bytes, complete: bool) -> tuple[int, bool]:
    """(status or 0, whether the answer is whole)."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        try:
            connection.sendall(request)
            if not complete:
                connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # it was answered before all was sent
        connection.settimeout(_PATIENCE_S)
        found, closed = b"", False
        while (answer := _parse(found, request.startswith(b"HEAD "))) is None:
            try:
                part = connection.recv(65536)
            except TimeoutError:
                if closed:
                    return 0, False
                closed = True
                connection.settimeout(60)
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)
                continue
            except ConnectionError:
                part = b""
            if not part:
                return (int(found[9:12]) if found.startswith(b"HTTP/1.1 ") else 0), False
            found += part
        return answer


def _parse(found: bytes, head_only: bool) -> tuple[int, bool] | None:
    """(status, whether errors are JSON) of a whole answer; None while bytes are missing."""
    if found.startswith(b"HTTP/1.1 100 "):
        found = found.partition(b"\r\n\r\n")[2]
    head, end, body = found.partition(b"\r\n\r\n")
    length = re.search(rb"(?im)^content-length: (\d+)", head)
    if not end or length is None or (not head_only and len(body) < int(length[1])):
        return None
    status = int(head[9:12])
    return status, head_only or status < 400 or b'"error"' in body
