"""Vision servers as contenders: this project's and LitServe's, on the same graph."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from serve_vision import Client, body

from comparison.environments import peer, project
from comparison.harness import Settings
from comparison.models import FP8PIPE
from comparison.processes import WORKERS, ContenderError, end_group, environment_of, last_lines

_TIMEOUT_S = 120.0
_POLL_S = 0.02


@dataclass(frozen=True)
class Kind:
    """How to start a server, and what to ask it.

    Attributes:
        command: the command line for a port.
        client: a client of a server on a port, whose requests all have the same image.
        log: the file that receives what the server writes.
        project: whether it imports this project.
    """

    command: Callable[[int], Sequence[str | Path]]
    client: Callable[[int], Client]
    log: Path
    project: bool


class Server:
    """A server that has answered its first request.

    Args:
        kind: what to start.

    Attributes:
        port: where it listens.
        seconds: time from its start to its first answer.

    Raises:
        ContenderError: it ended, or did not answer in time.
    """

    def __init__(self, kind: Kind) -> None:
        self.kind, self.port = kind, _free_port()
        began = time.monotonic()
        with kind.log.open("wb") as out:
            self.process = subprocess.Popen(
                [str(part) for part in kind.command(self.port)], stdout=out, stderr=subprocess.STDOUT,
                env=environment_of(project=kind.project, OMP_WAIT_POLICY="passive", ORT_DISABLE_TELEMETRY="1"),
                start_new_session=True,
            )  # fmt: skip
        try:
            while not self._answers():
                if self.process.poll() is not None:
                    raise ContenderError(f"the server ended: {last_lines(kind.log)}")
                if time.monotonic() - began > _TIMEOUT_S:
                    raise ContenderError(f"no answer within {_TIMEOUT_S:g} s: {last_lines(kind.log)}")
                time.sleep(_POLL_S)
        except ContenderError:
            self.close()
            raise
        self.seconds = time.monotonic() - began

    def _answers(self) -> bool:
        try:
            return asyncio.run(asyncio.wait_for(self.kind.client(self.port).call(), _TIMEOUT_S)) == 200
        except (OSError, asyncio.IncompleteReadError):
            return False

    def close(self) -> None:
        """End it, with its children."""
        end_group(self.process.pid)
        self.process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def fp8pipe_server(settings: Settings, export: Path, pixels: np.ndarray, options: Sequence[str]) -> Kind:
    """`fp8pipe serve` on an export.

    Args:
        settings: shared settings.
        export: the export.
        pixels: the image of every request, (1, 3, H, W) float32.
        options: further options of the command.
    """
    request = body(export.name, pixels)
    usual = [*FP8PIPE, "serve", export, "--unvalidated", "--no-access-log", *options, "--port"]
    return Kind(lambda port: [*usual, str(port)], lambda port: Client(port, *request), settings.work / "serve.log",
                True)  # fmt: skip


def litserve_server(settings: Settings, graph: Path, pixels: np.ndarray, batch: int) -> Kind:
    """LitServe on a graph.

    Args:
        settings: shared settings; it has one process per thread, each with one thread.
        graph: the ONNX graph.
        pixels: the image of every request, (1, 3, H, W) float32.
        batch: largest batch.

    Raises:
        ContenderError: it cannot be installed.
    """
    python = peer("litserve", settings.environments).python()
    content = json.dumps({"pixels": base64.b64encode(pixels.tobytes()).decode()}).encode()
    fixed = ["--max-batch", str(batch), "--workers", str(settings.threads)]

    def command(port: int) -> list[str | Path]:
        return [python, WORKERS / "serve_litserve.py", graph, str(port), *fixed]

    def client(port: int) -> Client:
        return Client(port, "/predict", "Content-Type: application/json", content)

    return Kind(command, client, settings.work / f"litserve-{batch}.log", False)


OURS_ENVIRONMENT = project("onnxruntime", "uvicorn")
