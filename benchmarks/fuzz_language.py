"""Send malformed and malicious requests to a running language service, and count its responses by status.

    python benchmarks/fuzz_language.py URL [--key KEY] [--model NAME] [--count 2000] [--seed 0] [--pid PID]

The test fails if a connection hangs, if a complete request gets no response, if a status is 5xx other than 503 and 504,
if a request with a wrong key succeeds, if the service does not respond afterwards, or if the memory of the process PID
has grown by more than 64 MB since the first quarter of the requests. The result is printed as JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

# Longer than every time limit of the service: 10 s for headers, 30 s for bodies, 30 s for probes of a failing engine.
_HANG_S = 100.0
_GROWTH_MB = 64.0
_PATHS = (
    "/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/artifact", "/v1/embeddings", "/v1/responses",
    "/tokenize", "/v1/../../../etc/passwd", "/..%2f..%2fetc%2fpasswd", "/%00", "//", "/v1/%ff%fe", "/metrics",
    "/healthz", "/readyz", "/", "/" + "a" * 3000, "/v1/completions?" + "x=1&" * 500, "*", "http://elsewhere/v1/models",
)  # fmt: skip
_VALUES = (None, True, -1, 0, 1e308, 2**70, "", "x" * 5000, [], {}, [[]], "\ud800", ["a"] * 100, {"role": "user"},
           [{"role": "user", "content": "hi"}], [{"role": 3, "content": None}], "hello", 0.5, 4, "NaN")  # fmt: skip
_FIELDS = ("model", "prompt", "messages", "max_tokens", "temperature", "top_p", "n", "stream", "stop", "logprobs",
           "seed", "logit_bias", "echo", "best_of", "tools", "response_format", "user", "stream_options",
           "min_tokens")  # fmt: skip
_TYPES = ("application/json", "text/plain", "", "application/json; charset=utf-16", "multipart/form-data", "\x7f")


class Sender:
    """Generates random requests.

    Args:
        chance: the source of all random draws.
        key: a valid API key; None if the service has no keys.
        model: the name of a served model.
    """

    def __init__(self, chance: random.Random, key: str | None, model: str) -> None:
        self.chance, self.key, self.model = chance, key, model

    def json_body(self) -> bytes:
        """A JSON document, usually an object with valid and invalid fields of a completion request."""
        chance = self.chance
        document: object = {chance.choice(_FIELDS): chance.choice(_VALUES) for _ in range(chance.randrange(6))}
        if isinstance(document, dict):
            document = {"model": self.model, "prompt": "Hello", "max_tokens": 2} | document
            if "messages" in document:
                document.pop("prompt")
            for name in ("n", "best_of", "max_tokens", "min_tokens"):  # large values are valid, but take too long
                if isinstance(document.get(name), int | float) and document[name] > 4:
                    document[name] = chance.choice((3, 1.5, "7"))
        if chance.random() < 0.1:
            document = chance.choice(_VALUES)
        return json.dumps(document).encode()

    def body(self) -> bytes:
        """The body of a request: JSON, deeply nested or damaged JSON, random bytes, or a body that is too large."""
        chance = self.chance
        kind = chance.random()
        if kind < 0.5:
            return self.json_body()
        if kind < 0.6:
            return b"[" * chance.choice((10, 100_000))
        if kind < 0.7:
            return chance.randbytes(chance.choice((0, 1, 1000, 100_000)))
        if kind < 0.72:
            return b"x" * 17_000_000  # above the size limit
        changed = bytearray(self.json_body())
        for _ in range(chance.choice((1, 4, 32))):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        return bytes(changed[: chance.randrange(len(changed) + 1)])

    def request(self) -> tuple[bytes, bool]:
        """The bytes of a complete HTTP request with a random body, and whether it has a valid key."""
        chance = self.chance
        body = self.body()
        method = chance.choice(("POST",) * 6 + ("GET", "PUT", "DELETE", "HEAD", "OPTIONS"))
        path = chance.choice(_PATHS[:2] if chance.random() < 0.6 else _PATHS)
        authorized = chance.random() < 0.85
        key = self.key if authorized else chance.choice(("", "wrong", "x" * 10_000))
        lines = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close"]
        lines += [f"Content-Type: {chance.choice(_TYPES if chance.random() < 0.3 else _TYPES[:1])}"]
        lines += [f"Authorization: Bearer {key}"] if key is not None else []
        if chance.random() < 0.1:
            lines += [f"X-Junk-{i}: {'y' * chance.choice((1, 500))}" for i in range(chance.choice((5, 60)))]
        head = ("\r\n".join([*lines, f"Content-Length: {len(body)}"]) + "\r\n\r\n").encode("latin-1")
        return head + body, authorized

    def broken(self) -> bytes:
        """The bytes of an incomplete or invalid HTTP request."""
        chance, (whole, _) = self.chance, self.request()
        head, _, body = whole.partition(b"\r\n\r\n")
        kind = chance.randrange(6)
        if kind == 0:
            return chance.randbytes(chance.choice((1, 50, 5000)))
        if kind == 1:
            return whole[: chance.randrange(len(whole))]
        if kind == 2:
            changed = bytearray(head)
            for _ in range(chance.choice((1, 5, 50))):
                changed[chance.randrange(len(changed))] = chance.randrange(256)
            return bytes(changed) + b"\r\n\r\n" + body
        if kind == 3:
            lying = chance.choice((b"Content-Length: -1", b"Content-Length: 99999999999", b"Transfer-Encoding: chunked",
                                   b"Content-Length: 1\r\nContent-Length: 2"))  # fmt: skip
            return re.sub(rb"Content-Length: \d+", lying, head) + b"\r\n\r\n" + body
        if kind == 4:
            return head + b"\r\nX: " + b"h" * 100_000 + b"\r\n\r\n" + body
        version = chance.choice((b"HTTP/9.9", b"HTTP/1.0", b"GARBAGE", b""))
        return head.replace(b"HTTP/1.1", version) + b"\r\n\r\n" + body


def exchange(address: tuple[str, int], data: bytes, chance: random.Random, *, half_close: bool) -> bytes:
    """Send bytes to the service, and return what it sends back until it closes the connection.

    Args:
        address: host and port.
        data: the bytes; sometimes they are sent slowly, in small parts.
        chance: the source of random draws.
        half_close: whether to close the sending side of the connection after `data`.

    Returns:
        The response; empty if the service closed the connection without one.
    """
    found = bytearray()
    with socket.create_connection(address, timeout=_HANG_S) as connection:
        try:
            if chance.random() < 0.05 and len(data) < 20_000:
                for start in range(0, len(data), 997):
                    connection.sendall(data[start : start + 997])
                    time.sleep(0.005)
            else:
                connection.sendall(data)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                found += part
        except ConnectionError:
            pass
    return bytes(found)


def slow_loris(address: tuple[str, int], count: int = 20) -> int:
    """Open connections that send only a part of a request's headers; returns how many the service closed."""
    held = [socket.create_connection(address, timeout=_HANG_S) for _ in range(count)]
    for connection in held:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Slow: ")
    ended = 0
    for connection in held:
        with connection:
            while connection.recv(4096):
                pass
            ended += 1
    return ended


def resident_mb(pid: int) -> float:
    """Resident memory of a process, in MB."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(encoding="utf-8"))
    return 0.0 if found is None else int(found[1]) / 1000


def fuzz(
    url: str, count: int, seed: int, key: str | None, model: str, memory: Callable[[], float]
) -> dict[str, object]:
    """Send random requests one after the other.

    Args:
        url: address of the service.
        count: number of requests.
        seed: seed of the random draws.
        key: a valid API key; None if the service has no keys.
        model: the name of a served model.
        memory: returns the memory of the service in MB.

    Returns:
        The number of responses by status, other figures, and the list of `faults`.
    """
    parts = urlsplit(url)
    address = (parts.hostname or "127.0.0.1", parts.port or 80)
    chance = random.Random(seed)
    sender = Sender(chance, key, model)
    statuses: Counter[str] = Counter()
    faults: list[str] = []
    before = memory()
    for number in range(count):
        if number == count // 4:
            before = memory()
        broken = chance.random() < 0.3
        data, authorized = (sender.broken(), True) if broken else sender.request()
        reply = exchange(address, data, chance, half_close=broken)
        status = int(reply[9:12]) if reply.startswith(b"HTTP/1.") else 0
        statuses[str(status) if status else "closed"] += 1
        opened = re.match(rb"\w+ (/|/healthz|/readyz)[? ]", data) is not None
        if status >= 500 and status not in (503, 504):
            faults.append(f"{status} to {data[:300]!r}: {reply[-300:]!r}")
        elif not broken and not status:
            faults.append(f"no answer to {data[:300]!r}")
        elif not broken and key is not None and not authorized and status < 400 and not opened:
            faults.append(f"{status} without a key to {data[:300]!r}")
    ended = slow_loris(address)
    last = exchange(address, b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", chance, half_close=False)
    if not last.startswith(b"HTTP/1.1 200"):
        faults.append("no healthz afterwards")
    grown = memory() - before
    if grown > _GROWTH_MB:
        faults.append(f"memory grew by {grown:.0f} MB")
    return {"requests": count, "seed": seed, "statuses": dict(sorted(statuses.items())), "slow_loris_ended": ended,
            "memory_grown_mb": round(grown, 1), "faults": faults}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--key", help="a valid API key of the service")
    parser.add_argument("--model", default="m", help="name of the served model (m)")
    parser.add_argument("--count", type=int, default=2000, help="number of requests (2000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pid", type=int, help="process id of the service, to watch its memory")
    options = parser.parse_args()
    found = fuzz(options.url, options.count, options.seed, options.key, options.model,
                 lambda: resident_mb(options.pid) if options.pid else 0.0)  # fmt: skip
    print(json.dumps(found, indent=2))
    return int(bool(found["faults"]))


if __name__ == "__main__":
    sys.exit(main())
