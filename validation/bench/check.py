"""`serve-check`: start the service as a user would, send requests, check the answers, and stop it.

The service is `fp8pipe serve` in a separate process. It must become ready, report the right artifact digest, give the
expected answers, and shut down cleanly on SIGTERM.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from exporters.graph.formats import GraphDetails
from exporters.target import call, open_export
from fp8pipe.artifact import Artifact, Gate, open_artifact
from fp8pipe.artifact.record import DIGEST_HEADER
from fp8pipe.core.errors import ConfigurationError, Fp8PipeError, word
from validation.bench.record import MeasureRecord, ServeCheckConfig, figure, write_measure
from validation.vllm.launcher import answers, free_port, open_local

_END_S = 120.0
_PACKAGES = ("onnxruntime", "fastapi", "uvicorn")


def serve_check(export: Path, config: ServeCheckConfig) -> MeasureRecord:
    """Check the service of an export and write `<export>.serve-check.json` next to it.

    Args:
        export: directory of the export.
        config: the requests to send; for a language export also vLLM's serving options.

    Returns:
        The record; its verdict is REJECT if an answer was wrong or the service did not stop cleanly.

    Raises:
        BadArtifactError: the export is damaged, or of a kind that cannot be served.
        ConfigurationError: vLLM's serving options were given for a vision export.
        Fp8PipeError: the service did not become ready; its last log lines are quoted.
    """
    artifact, target = open_export(export, lambda known: known.service.ask)
    artifact = open_artifact(artifact.root)
    options = config.options()
    if options and target.service.domain != "language":
        raise ConfigurationError(
            f"{' '.join(options)} cannot be given here", why="these options are for vLLM, but this is a vision export",
            fix="leave them out",
        )  # fmt: skip
    started = time.monotonic()
    with _service(artifact.root, config.ready_s, options) as (url, process):
        ready = time.monotonic() - started
        gates = [_identity(url, artifact)]
        asked, answers = call(target.service.ask or "", url, artifact, config)
        gates += answers
        process.send_signal(signal.SIGTERM)
        code = process.wait(_END_S)
    gates.append(Gate(name="exit status after SIGTERM", value=code, detail="0: the service ended cleanly"))
    rows = [
        figure("time until ready", "ready_s", ready, "s", "hashes, load and warm-up"),
        figure("requests asked", "requests", asked),
        *(figure(g.name, g.name.replace(" ", "_").lower(), g.value or 0.0, detail=g.detail) for g in gates),
    ]
    return write_measure(artifact, "serve-check", config, rows, packages=_PACKAGES, gates=gates)


@contextmanager
def _service(export: Path, ready_s: float, options: list[str]) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start the service on a free port, wait until it is ready, and yield its URL and its process.

    The process is killed at the end of the `with` block if it is still running.

    Raises:
        Fp8PipeError: the service ended, or was not ready within `ready_s` seconds.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-P", "-m", "fp8pipe", "serve", str(export), "--port", str(port), "--no-access-log"]
    command.append("--unvalidated")  # this checks the answers, not whether the export was validated
    command += options
    with tempfile.NamedTemporaryFile(prefix="fp8pipe-serve-", suffix=".log") as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log)
        try:
            deadline = time.monotonic() + ready_s
            while not answers(f"{url}/readyz"):
                if process.poll() is not None or time.monotonic() > deadline:
                    lines = Path(log.name).read_text(errors="replace").splitlines()[-8:]
                    alive = process.poll() is None
                    state = "did not become ready in time" if alive else f"ended with exit code {process.returncode}"
                    raise Fp8PipeError(
                        f"the service {state}", why="\n".join(lines), fix=f"try: fp8pipe serve {word(export)}"
                    )
                time.sleep(0.2)
            yield url, process
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _call(url: str, body: bytes | None = None) -> tuple[int, bytes, dict[str, str]]:
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    try:
        with open_local(request, timeout_s=300) as reply:
            return reply.status, reply.read(), {key.lower(): value for key, value in reply.headers.items()}
    except urllib.error.HTTPError as error:
        return error.code, error.read(), {}


def _identity(url: str, artifact: Artifact) -> Gate:
    status, body, headers = _call(f"{url}/v1/artifact")
    said = json.loads(body).get("digest") if status == 200 else None
    header = headers.get(DIGEST_HEADER, "").removeprefix("sha256:")
    differing = int(said != artifact.digest) + int(header != artifact.digest)
    detail = "digests in /v1/artifact and in the response header, against the manifest's"
    return Gate(name="identities differing", value=differing, detail=detail)


def ask_vision(url: str, artifact: Artifact, config: ServeCheckConfig) -> tuple[int, list[Gate]]:
    """Send random pixels through the Open Inference Protocol, and compare the outputs with the graph run in-process.

    Returns:
        The number of requests; and gates that require all requests to be accepted and all outputs to be bit-identical.
    """
    from exporters.graph.formats import MODEL_FILE
    from exporters.graph.runtime import open_session

    session = open_session(artifact.root / MODEL_FILE)
    names = session.get_inputs()[0].name, session.get_outputs()[0].name
    shape = tuple(map(int, artifact.manifest.details_of(GraphDetails).input.shape[1:]))
    pixels = np.random.default_rng(0).standard_normal((config.images, *shape), dtype=np.float32)
    differing = refused = 0
    model = json.loads(_call(f"{url}/v1/artifact")[1])["name"]
    for image in pixels:
        tensor = {"name": names[0], "shape": [1, *shape], "datatype": "FP32", "data": image.ravel().tolist()}
        status, body, _ = _call(f"{url}/v2/models/{model}/infer", json.dumps({"inputs": [tensor]}).encode())
        if status != 200:
            refused += 1
            continue
        served = np.array(json.loads(body)["outputs"][0]["data"], dtype=np.float32)
        expected = session.run([names[1]], {names[0]: image[None]})[0].ravel()
        differing += int((served != expected).sum())
    detail = f"of {config.images} images, against ONNX Runtime called directly"
    return config.images, [
        Gate(name="requests refused", value=refused, detail=f"of {config.images}"),
        Gate(name="outputs differing", value=differing, detail=detail),
    ]


def ask_language(url: str, artifact: Artifact, config: ServeCheckConfig) -> tuple[int, list[Gate]]:
    """Ask every question with and without streaming.

    Returns:
        The number of requests; and gates that require the two greedy answers to be equal and not empty.
    """
    model = json.loads(_call(f"{url}/v1/models")[1])["data"][0]["id"]
    empty = differing = 0
    for prompt in config.prompts:
        body = {
            "model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0,
            "max_tokens": config.tokens,
        }  # fmt: skip
        whole = _content(_call(f"{url}/v1/chat/completions", json.dumps(body).encode())[1])
        stream = _call(f"{url}/v1/chat/completions", json.dumps(body | {"stream": True}).encode())[1]
        empty += not whole.strip()
        differing += whole != _joined(stream)
    detail = "streamed against whole answers to the same questions, both greedy"
    return 2 * len(config.prompts), [
        Gate(name="empty answers", value=empty, detail=f"of {len(config.prompts)}"),
        Gate(name="streamed answers differing", value=differing, detail=detail),
    ]


def _content(body: bytes) -> str:
    document: dict[str, Any] = json.loads(body)
    return str(document["choices"][0]["message"]["content"]) if "choices" in document else ""


def _joined(stream: bytes) -> str:
    events = [line.removeprefix(b"data: ") for line in stream.splitlines() if line.startswith(b"data: {")]
    choices = [json.loads(event).get("choices") or [] for event in events]
    return "".join(choice["delta"].get("content") or "" for found in choices for choice in found)
