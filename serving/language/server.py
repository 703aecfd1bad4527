"""`fp8pipe serve` on a language export: the front, the supervisor and vLLM, from start to drain.

The port opens at once and answers `/healthz`; `/readyz` turns 200 when vLLM answers. On SIGTERM readiness ends, what
was accepted is finished, then vLLM is ended. vLLM's output goes to a log file that is shown when the first start fails.

vLLM listens on a Unix socket in a private directory, so that no other user of the machine reaches it past the API keys,
and no port can be taken by another process between two starts.
"""

from __future__ import annotations

import asyncio
import logging
import math
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from prometheus_client import Gauge
from starlette.applications import Starlette

from exporters.vllm.environment import VllmEnvironment, find_vllm_python, inspect_environment
from exporters.vllm.target import KIND
from fp8pipe.artifact import Artifact, open_artifact, staged
from fp8pipe.core.errors import Fp8PipeError, MissingCapabilityError
from serving.config import LanguageConfig, ServeConfig
from serving.http.server import Lifecycle
from serving.http.service import Proof, identity_of, proof_of, read_keys, serve
from serving.http.telemetry import HttpMetrics
from serving.language.front import Front
from serving.language.supervisor import Child, State, Supervisor
from serving.language.upstream import KEEP_ALIVE_S, Upstream

logger = logging.getLogger(__name__)
_AFTER_DRAIN_S = 5  # for the errors that end what still ran when the drain was over


def serve_language(export: Path, config: ServeConfig, language: LanguageConfig | None = None) -> int:
    """Serve a vllm export, every file of which is hashed first, until a signal ends it; 0 after an orderly end.

    Raises:
        BadArtifactError: the export's files are not those of its manifest, or vLLM cannot load it.
        GateFailedError: no validation accepts it as it would be served, and `unvalidated` is not set.
        ConfigurationError: the API keys cannot be read, or the address cannot be listened on.
        MissingCapabilityError: no vLLM, no GPU for one that is built for it, or no plugin for FP8 on this CPU.
        OutOfMemoryError: vLLM ran out of memory while it started.
    """
    chosen = language or LanguageConfig()
    artifact = open_artifact(export, kind=KIND, verify=True)
    environment = inspect_environment(find_vllm_python(chosen.vllm_python))
    chosen = chosen.with_defaults(artifact.root, on_cpu=environment.on_cpu)
    proof = proof_of(artifact, config, environment.versions, chosen.in_words(environment))
    with tempfile.TemporaryDirectory(prefix="fp8pipe-serve-") as folder, staged(artifact) as model_dir:  # mode 0700
        socket, log = Path(folder) / "vllm.sock", Path(folder) / "vllm.log"
        command = _engine_command(environment, artifact, model_dir, chosen, socket)
        model, env = chosen.name_of(artifact), chosen.variables(VLLM_HTTP_TIMEOUT_KEEP_ALIVE=str(KEEP_ALIVE_S))
        supervisor = supervise(command, env, socket, log, model, chosen)
        return run_front(supervisor, artifact, config, chosen, proof)


def _engine_command(
    vllm: VllmEnvironment, artifact: Artifact, model_dir: Path, config: LanguageConfig, socket: Path
) -> list[str]:
    """The command line of vLLM's server, which loads what `model_dir` holds.

    Raises:
        MissingCapabilityError: FP8 codes on a CPU without the plugin, which stock vLLM refuses or runs very slowly.
    """
    quantized = artifact.manifest.number_format is not None
    if quantized and vllm.on_cpu and vllm.plugin is None:
        raise MissingCapabilityError(
            f"{vllm.python} lacks the plugin that runs FP8 on CPUs", why="fp8pipe-vllm-cpu is not installed there",
            fix="run scripts/setup_vllm.sh, or install serving/vllm_plugin there",
        )  # fmt: skip
    command = [str(vllm.python), "-P", "-m", "vllm.entrypoints.openai.api_server", "--uds", str(socket)]
    command += ["--model", str(model_dir), "--served-model-name", config.name_of(artifact)]
    return [*command, "--disable-uvicorn-access-log", *config.arguments()]


def supervise(
    command: list[str], env: dict[str, str], socket: Path, log: Path, model: str, language: LanguageConfig
) -> Supervisor:
    """A supervisor, not yet running, of a server of `model` that listens on `socket`."""

    def start() -> Child:
        socket.unlink(missing_ok=True)  # of a run that was killed
        return Child(command, env, log)

    return Supervisor(start, Upstream(socket), model, language.supervision)


def run_front(
    supervisor: Supervisor, artifact: Artifact, config: ServeConfig, language: LanguageConfig, proof: Proof
) -> int:
    """Serve until a signal comes. Raises what made vLLM's first start fail."""
    keys, lifecycle, metrics = read_keys(config), Lifecycle(), HttpMetrics()
    up = Gauge("fp8pipe_engine_up", "1 while vLLM answers.", registry=metrics.registry)
    up.set_function(lambda: supervisor.state is State.READY)
    restarts = Gauge("fp8pipe_engine_restarts", "Restarts of vLLM so far.", registry=metrics.registry)
    restarts.set_function(lambda: supervisor.restarts)
    front = Front(
        supervisor, lifecycle, metrics, identity_of(artifact, proof),
        with_page=config.page, timeout_s=language.request_timeout_s,
    )  # fmt: skip
    drain_s = max(config.linger_s, language.drain_seconds)
    serve(_supervised(front, drain_s), artifact, config, proof=proof, keys=keys, metrics=metrics, lifecycle=lifecycle,
          drain_s=math.ceil(drain_s) + _AFTER_DRAIN_S)  # fmt: skip
    if supervisor.failure is not None:
        raise supervisor.failure
    return 0


def _supervised(front: Front, drain_s: float) -> Any:
    """`front`, with its supervisor running between the service's start and its end."""
    supervisor = front.supervisor

    def leave(*_: Any) -> None:
        front.lifecycle.leave()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        front.end_after_drain(drain_s)
        task = asyncio.create_task(supervisor.run(leave))
        # A supervisor that fails unforeseen must end the service, not leave it without one.
        task.add_done_callback(leave)
        try:
            yield
        finally:
            task.cancel()
            try:
                await task
            except asyncio.CancelledError:
                pass
            except Exception as error:
                logger.exception("the supervisor failed")
                supervisor.failure = Fp8PipeError("the supervisor of vLLM failed", why=repr(error))

    own = Starlette(lifespan=lifespan)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await (front if scope["type"] == "http" else own)(scope, receive, send)

    return app
