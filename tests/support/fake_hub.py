"""A small hub that speaks the real one's HTTP: repositories, preupload, LFS, commits. Keeps the bytes that arrive."""

from __future__ import annotations

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """What the hub knows, and how it misbehaves.

    Attributes:
        url: where it listens.
        private: by repository.
        blobs: LFS objects by sha256.
        files: by path, of the last commit.
        commits: headers of commits.
        calls: method and path of every request.
        tokens: of the requests.
        fail: status by a part of the path, sent in place of an answer.
        cut: PUTs after which connections are closed without an answer; None for never.
    """

    url: str = ""
    private: dict[str, bool] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[dict[str, Any]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)
    fail: dict[str, int] = field(default_factory=dict)
    cut: int | None = None


@contextlib.contextmanager
def fake_hub() -> Iterator[Hub]:
    """Run one on a free port until the block ends."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        return

    def do_GET(self) -> None:
        self._begin()
        repo = self.path.removeprefix("/api/models/").partition("?")[0].partition("/revision")[0]
        if self._failed():
            return
        if repo not in self.hub.private:
            return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        self._send(200, {"_id": "1", "id": repo, "private": self.hub.private[repo], "siblings": []})

    def do_POST(self) -> None:
        body = self._begin()
        if self._failed():
            return
        if self.path == "/api/repos/create":
            return self._create(json.loads(body))
        if self.path == "/api/validate-yaml":
            return self._send(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            small = (".json", ".md", ".sha256")
            modes = {f["path"]: "regular" if f["path"].endswith(small) else "lfs" for f in asked}
            files = [{"path": p, "uploadMode": m, "shouldIgnore": False, "oid": None} for p, m in modes.items()]
            return self._send(200, {"files": files})
        if self.path.endswith("/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        if "/commit/" in self.path:
            return self._commit(body)
        self._send(404, {"error": f"no such endpoint: {self.path}"})

    def do_PUT(self) -> None:
        body = self._begin()
        if self.hub.cut is not None:
            if self.hub.cut <= 0:
                self.close_connection = True
                self.connection.close()
                return
            self.hub.cut -= 1
        if self._failed():
            return
        self.hub.blobs[self.path.rpartition("/")[2]] = body
        self._send(200, {})

    def _begin(self) -> bytes:
        self.hub.calls.append(f"{self.command} {self.path}")
        if self.path.startswith(("/api/repos/", "/api/models/")) or ".git/" in self.path:
            self.hub.tokens.add(self.headers.get("authorization"))
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().strip() or b"0", 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def _failed(self) -> bool:
        for part, status in self.hub.fail.items():
            if part in self.path:
                self._send(status, {"error": f"refused with {status}"})
                return True
        return False

    def _create(self, asked: dict[str, Any]) -> None:
        repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
        if repo in self.hub.private:
            return self._send(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"})
        self.hub.private[repo] = bool(asked.get("private") or asked.get("visibility") == "private")
        self._send(200, {"url": f"{self.hub.url}/{repo}", "name": repo})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for entry in asked["objects"]:
            known = entry["oid"] in self.hub.blobs
            actions = {} if known else {"actions": {"upload": {"href": f"{self.hub.url}/blob/{entry['oid']}"}}}
            objects.append({"oid": entry["oid"], "size": entry["size"], **actions})
        self._send(200, {"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def _commit(self, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.commits.append(value)
            if line["key"] == "file":
                self.hub.files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                self.hub.files[value["path"]] = self.hub.blobs[value["oid"]]
        repo = self.path.removeprefix("/api/models/").partition("/commit/")[0]
        answer: dict[str, Any] = {"success": True, "commitOid": "a" * 40}
        answer["commitUrl"] = f"{self.hub.url}/{repo}/commit/{answer['commitOid']}"
        if "create_pr=1" in self.path:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/1"
        self._send(200, answer)

    def _send(
        self, status: int, document: Any, headers: dict[str, str] | None = None, kind: str = "application/json"
    ) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(data)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
