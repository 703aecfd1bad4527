"""`fp8pipe serve` on a language export: the front, the supervisor and vLLM, from start to drain.

The port opens at once and answers `/healthz`; `/readyz` turns 200 when vLLM answers. On SIGTERM readiness ends, what
was accepted is finished, then vLLM is ended. vLLM's output goes to a log file that is shown when the first start fails.
"""

from __future__ import annotations

import asyncio
import logging
import math
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from prometheus_client import Gauge
from starlette.applications import Starlette

from exporters.vllm.environment import find_vllm_python, inspect_environment
from exporters.vllm.target import KIND
from fp8pipe.artifact import Artifact, open_artifact
from fp8pipe.core.errors import Fp8PipeError
from serving.http.access_log import start_access_log
from serving.http.auth import KeyFile
from serving.http.config import ServeConfig
from serving.http.identity import identity_headers, identity_labels, identity_of
from serving.http.metrics import HttpMetrics
from serving.http.server import Lifecycle, make_server
from serving.http.stack import wrap
from serving.language.arguments import engine_command, engine_environment
from serving.language.child import Child
from serving.language.config import LanguageConfig
from serving.language.front import Front
from serving.language.supervisor import State, Supervisor
from serving.language.upstream import Upstream

__all__ = ["run_front", "serve_language", "supervise"]

logger = logging.getLogger(__name__)
# For the errors that end what still ran when the drain was over.
_LAST_WORDS_S = 5


def serve_language(export: Path, config: ServeConfig, language: LanguageConfig | None = None) -> int:
    """Serve a vllm export until a signal ends it.

    Args:
        export: the export's directory; every file is hashed first.
        config: of the service.
        language: of vLLM.

    Returns:
        0 after an orderly end.

    Raises:
        BadArtifactError: the export's files are not those of its manifest, or vLLM cannot load it.
        ConfigurationError: the API keys cannot be read.
        MissingCapabilityError: no vLLM, or no plugin for FP8 on this CPU.
        OutOfMemoryError: vLLM ran out of memory while it started.
    """
    chosen = language or LanguageConfig()
    artifact = open_artifact(export, kind=KIND, verify=True)
    environment = inspect_environment(find_vllm_python(chosen.vllm_python))
    with tempfile.TemporaryDirectory(prefix="fp8pipe-serve-") as folder:  # mode 0700
        socket, log = Path(folder) / "vllm.sock", Path(folder) / "vllm.log"
        command = engine_command(environment, artifact, chosen, socket)
        model = chosen.name_of(artifact)
        supervisor = supervise(command, engine_environment(chosen), socket, log, model, chosen)
        return run_front(supervisor, artifact, config, chosen)


def supervise(
    command: list[str], env: dict[str, str], socket: Path, log: Path, model: str, language: LanguageConfig
) -> Supervisor:
    """A supervisor, not yet running, of a server of `model` that listens on `socket`."""

    def start() -> Child:
        socket.unlink(missing_ok=True)  # of a run that was killed
        return Child(command, env, log)

    return Supervisor(start, Upstream(socket), model, language.supervision)


def run_front(supervisor: Supervisor, artifact: Artifact, config: ServeConfig, language: LanguageConfig) -> int:
    """Serve until a signal comes. Raises what made vLLM's first start fail."""
    lifecycle, metrics = Lifecycle(), HttpMetrics()
    metrics.identify(identity_labels(artifact))
    Gauge("fp8pipe_engine_up", "1 while vLLM answers.", registry=metrics.registry).set_function(
        lambda: supervisor.state is State.READY
    )
    Gauge("fp8pipe_engine_restarts", "Restarts of vLLM so far.", registry=metrics.registry).set_function(
        lambda: supervisor.restarts
    )
    lifecycle.on_drain.append(lambda: metrics.in_drain.set(1))
    keys = None if config.api_key_file is None else KeyFile(config.api_key_file)
    access, writer = start_access_log(config.access_log)
    front = Front(
        supervisor, lifecycle, metrics, identity_of(artifact), supervisor.model,
        with_page=config.page, timeout_s=language.request_timeout_s,
    )  # fmt: skip
    headers = identity_headers(artifact)
    layers = wrap(front, config, keys=keys, logger=access, metrics=metrics, lifecycle=lifecycle, headers=headers)
    drain_s = max(config.linger_s, language.drain_seconds)
    app = _with_lifespan(layers, supervisor, lambda: setattr(service, "should_exit", True),
                         lambda: front.end_after_drain(drain_s))  # fmt: skip
    service = make_server(app, config, lifecycle, reload=keys.reload if keys is not None else lambda: None)
    service.config.timeout_graceful_shutdown = math.ceil(drain_s) + _LAST_WORDS_S
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    try:
        service.run()
    finally:
        if writer is not None:
            writer.stop()
    if supervisor.failure is not None:
        raise supervisor.failure
    return 0


def _with_lifespan(layers: Any, supervisor: Supervisor, leave: Callable[[], None], begin: Callable[[], None]) -> Any:
    """`layers`, with the supervisor running between the service's start, where `begin` is called, and its end."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        begin()
        task = asyncio.create_task(supervisor.run(leave))
        # A supervisor that fails unforeseen must end the service, not leave it without one.
        task.add_done_callback(lambda _: leave())
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
        await (layers if scope["type"] == "http" else own)(scope, receive, send)

    return app
