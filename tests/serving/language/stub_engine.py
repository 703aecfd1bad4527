"""A small real HTTP server on a Unix socket, where a test is about supervision and the front, not about vLLM.

`stub_engine.py SOCKET STATE`: STATE is a folder; a file `refuse` in it makes it exit at its start, one called `hold`
makes it wait before it listens, and one called `hang` makes completions wait for ever while everything else is
answered. It starts a child of its own, as vLLM does, and writes both process ids to `STATE/pids`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import AF_UNIX
from socketserver import TCPServer
from typing import Any


class Server(ThreadingHTTPServer):
    address_family = AF_UNIX
    daemon_threads = True

    def server_bind(self) -> None:
        TCPServer.server_bind(self)
        self.server_name, self.server_port = "stub", 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    connections = 0

    def setup(self) -> None:
        super().setup()
        Handler.connections += 1
        self.connection_number = Handler.connections

    def address_string(self) -> str:
        return "stub"

    def log_message(self, *arguments: Any) -> None:
        return

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))  # else it would be taken for the next request
        if self.path == "/metrics":
            self._answer(b"# TYPE vllm:stub gauge\nvllm:stub 1.0\n", "text/plain")
        else:
            seen = {"path": self.path, "headers": dict(self.headers), "connection": self.connection_number}
            self._answer(json.dumps(seen).encode())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/v1/completions" and (Path(sys.argv[2]) / "hang").exists():
            time.sleep(1000)
        if self.path.startswith("/stream"):
            self._stream([str(number) for number in range(json.loads(body)["events"])])
        elif b'"stream":true' in body:
            last = json.loads(body)["messages"][-1]["content"]
            words = [json.dumps({"choices": [{"delta": {"content": f"word {n} "}}]}) for n in range(10)]
            self._stream([*words[:3], "crash"] if last == "break" else [*words, "[DONE]"])
        else:
            self._answer(body, "application/octet-stream")

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(b"", status=405)

    do_DELETE = do_OPTIONS = do_PUT

    def do_HEAD(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(b"")

    def _answer(self, body: bytes, kind: str = "application/json", status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, events: list[str]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in events:
            if event == "crash":
                os._exit(9)
            data = f"data: {event}\n\n".encode()
            self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))
            self.wfile.flush()
            time.sleep(0.05)
        self.wfile.write(b"0\r\n\r\n")


def main() -> None:
    socket, state = sys.argv[1], Path(sys.argv[2])
    if (state / "refuse").exists():
        print("RuntimeError: the model does not load")
        sys.exit(3)
    child = subprocess.Popen(["sleep", "1000"])
    while (state / "hold").exists():
        time.sleep(0.02)
    server = Server(socket, Handler)
    (state / "pids").write_text(f"{os.getpid()} {child.pid}", encoding="utf-8")
    server.serve_forever()


if __name__ == "__main__":
    main()
