"""Runs vLLM on an export, as a probe or as its OpenAI server; stops all its processes, and translates its failures.

The server is `python -P -m vllm.entrypoints.openai.api_server` in a new POSIX session: it starts an engine and workers
as further processes, and killing the process group stops all of them. `-P` keeps the working directory off the import
path, so that a user's folder called `vllm` is not imported. An API key is passed as an environment variable and not on
the command line, where other users of the machine could see it. The probe is a single process, also in a new session.
Output goes to a file, since vLLM's log is long and only its last lines matter after a failure.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

from pydantic import Field

from exporters.vllm.environment import (
    VllmEnvironment,
    end_group,
    engine_failure,
    find_vllm_python,
    inspect_environment,
    last_lines,
    subprocess_environment,
)
from exporters.vllm.target import KIND
from fp8pipe.artifact import open_artifact, staged
from fp8pipe.core.config import FrozenConfig
from fp8pipe.core.errors import ConfigurationError, Fp8PipeError
from fp8pipe.models.checkpoint.sidecars import read_config

logger = logging.getLogger(__name__)
_POLL_S = 0.25
_REPORT_EVERY_S = 5.0


class ServerOptions(FrozenConfig):
    """How to run the server. The defaults start fast on two cores."""

    host: str = Field(default="127.0.0.1", min_length=1, description="address to listen on")
    port: int = Field(default=0, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    api_key: str | None = Field(default=None, min_length=1, repr=False, description="key clients must send, if any")
    served_name: str | None = Field(default=None, min_length=1, description="model name; the directory's by default")
    dtype: str = Field(default="bfloat16", description="compute dtype: bfloat16, float16, float32 or auto")
    max_model_len: int = Field(default=1024, ge=16, description="context length, tokens; the model's own if shorter")
    max_num_seqs: int = Field(default=8, ge=1, description="requests served at once")
    kv_cache_gib: int = Field(default=1, ge=1, description="key/value cache on a CPU, GiB")
    enforce_eager: bool = Field(default=True, description="do not compile: starts minutes sooner, serves slower")
    extra: tuple[str, ...] = Field(default=(), description="more arguments for vLLM's server, as they are")
    timeout_s: float = Field(default=600.0, gt=0, description="longest wait for the server to answer, seconds")


@contextmanager
def server(
    export: Path, options: ServerOptions | None = None, *, vllm_python: str | None = None, verify: bool = True
) -> Iterator[str]:
    """Serve an export within the `with` block.

    Args:
        export: directory of a vLLM export.
        options: see ServerOptions.
        vllm_python: Python interpreter of vLLM's environment; found automatically when None.
        verify: check the hash of every file of the export before serving it.

    Yields:
        The base URL, such as `http://127.0.0.1:8000`; the API is under `/v1`.

    Raises:
        BadArtifactError: the export is damaged, or vLLM cannot load it (its last log lines are shown).
        ConfigurationError: the port is in use.
        MissingCapabilityError: vLLM is not installed.
        Fp8PipeError: the server did not respond within `timeout_s`.
    """
    chosen = options or ServerOptions()
    artifact = open_artifact(Path(export), kind=KIND, verify=verify)
    environment = inspect_environment(find_vllm_python(vllm_python))
    port = chosen.port or free_port(chosen.host)
    _check_port(chosen.host, port)
    variables = {"VLLM_CPU_KVCACHE_SPACE": str(chosen.kv_cache_gib)}
    if chosen.api_key is not None:
        variables["VLLM_API_KEY"] = chosen.api_key
    url = f"http://{_reachable(chosen.host)}:{port}"
    with tempfile.TemporaryDirectory(prefix="fp8pipe-server-") as folder, staged(artifact) as model:
        command, log = server_command(environment.python, model, chosen, port), Path(folder) / "server.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=subprocess_environment(**variables),
                start_new_session=True,
            )  # fmt: skip
        try:
            _wait(process, url, log, chosen.timeout_s)
            yield url
        finally:
            end_group(process)


def _context_length(export: Path, longest: int) -> int:
    """The shorter of the model's context length and `longest`: vLLM refuses a longer one than the model's."""
    config = read_config(export / "config.json")
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    own: list[int] = [text[key] for key in ("max_position_embeddings", "n_positions") if isinstance(text.get(key), int)]
    return min([longest, *own])


def server_command(python: Path, export: Path, options: ServerOptions, port: int) -> list[str]:
    """The command line of the server; contains no secrets."""
    command = [str(python), "-P", "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(export.absolute()), "--served-model-name", options.served_name or export.absolute().name]
    command += ["--host", options.host, "--port", str(port), "--dtype", options.dtype]
    length = _context_length(export, options.max_model_len)
    command += ["--max-model-len", str(length), "--max-num-seqs", str(options.max_num_seqs)]
    if options.enforce_eager:
        command.append("--enforce-eager")
    return [*command, *options.extra]


def free_port(host: str = "127.0.0.1") -> int:
    """A port that is free at this moment."""
    with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _reachable(host: str) -> str:
    """The address at which this machine can reach a server that listens on `host`."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _check_port(host: str, port: int) -> None:
    with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigurationError(
                f"the server cannot listen on {host}:{port}", why=str(error), fix="choose another --port"
            ) from error


def _wait(process: subprocess.Popen[bytes], url: str, log: Path, timeout_s: float) -> None:
    """Wait until `/health` answers; raise if the server exits or the time is up."""
    started = reported = time.monotonic()
    while not answers(f"{url}/health"):
        code = process.poll()
        if code is not None:
            raise engine_failure("vLLM's server ended while it started", code, log)
        now = time.monotonic()
        if now - started > timeout_s:
            raise Fp8PipeError(
                f"vLLM's server did not answer within {timeout_s:g} s",
                why=f"its last lines:\n{last_lines(log)}",
                fix="allow more time, or a machine with more cores",
            )
        if now - reported >= _REPORT_EVERY_S:
            reported = now
            logger.info("waiting for vLLM's server, %.0f s so far", now - started)
        time.sleep(_POLL_S)
    logger.info("vLLM's server answers at %s after %.1f s", url, time.monotonic() - started)


def open_local(request: str | urllib.request.Request, *, timeout_s: float) -> Any:
    """Send a request to this machine, bypassing any proxy that is set in the environment."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout_s)


def answers(url: str) -> bool:
    """Whether a server on this machine answers this URL with 200."""
    try:
        with open_local(url, timeout_s=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


PROBE = Path(__file__).with_name("probe.py")
SCORE = Path(__file__).with_name("score.py")
# vLLM's arguments for comparisons with torch: fp32, without features that would change the summation order.
PARITY_ARGUMENTS = (
    "--dtype", "float32", "--max-num-seqs", "4", "--enforce-eager", "--no-enable-prefix-caching", "--seed", "0",
    "--disable-log-stats",
)  # fmt: skip


def in_process() -> dict[str, str]:
    """Environment variables for the fp32 engine: weights stay readable, and activations are not quantized.

    A single process with few threads starts fastest and avoids oversubscription, since vLLM starts threads, too.
    """
    cores = len(os.sched_getaffinity(0))
    threads = str(max(1, min(16, cores // 2)))
    return subprocess_environment(
        OMP_NUM_THREADS=threads, VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind",
        FP8PIPE_VLLM_ACTIVATIONS="none", FP8PIPE_VLLM_KEEP_WEIGHTS="1",
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ProbeJob:
    """The input of a probe, which is passed to `probe.py` as JSON."""

    model: str  # directory of the export
    arguments: list[str]  # command-line arguments of vLLM's server
    tensors: Mapping[str, Mapping[str, Any]]  # `Expected.digests()` by checkpoint name
    sequences: list[list[int]] = field(default_factory=list)  # sequences of at least two token ids to be scored
    prompts: list[str] = field(default_factory=list)  # questions to answer
    chat: bool = True  # whether to apply the chat template; plain completion otherwise
    pictured: list[dict[str, Any]] | None = None  # message content of one more question, with an image and text
    max_tokens: int = 16  # longest answer, tokens
    products: bool = False  # whether to test the matrix multiplications of quantized layers
    variables: Mapping[str, str] = field(default_factory=in_process)  # environment variables


def run_probe(
    job: ProbeJob, environment: VllmEnvironment, dump: Path, *, timeout_s: float, ended: Event | None = None
) -> dict[str, Any]:
    """Run one job in a new engine process.

    Args:
        job: what to load, compare and ask.
        environment: the Python environment that contains vLLM.
        dump: an existing directory, in which tensors that differ are saved.
        timeout_s: time limit for the whole job, seconds.
        ended: set by another thread to stop the engine.

    Returns:
        The result of the probe, see `probe.run`.

    Raises:
        MissingCapabilityError: vLLM or the plugin cannot run in this installation.
        OutOfMemoryError: the engine ran out of memory or was killed for it.
        BadArtifactError: vLLM could not load or run the export; its last log lines are shown.
        Fp8PipeError: the job took longer than `timeout_s`, or `ended` was set.
    """
    document = {**asdict(job), "variables": None, "dump": str(dump)}
    return run_script(PROBE, document, job.variables, environment, timeout_s=timeout_s, ended=ended)


def run_script(
    script: Path, document: Mapping[str, Any], variables: Mapping[str, str], environment: VllmEnvironment, *,
    timeout_s: float, ended: Event | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run a script of this folder in a new process of vLLM's Python, and return its result.

    Args:
        script: PROBE or SCORE.
        document: its job, among others the directory of the `model`.
        variables: environment variables of the process.
        environment: see `run_probe`, as for the other arguments and the errors that are raised.
    """
    with tempfile.TemporaryDirectory(prefix="fp8pipe-probe-") as folder:
        root = Path(folder)
        (root / "job.json").write_text(json.dumps({**document, "result": str(root / "result.json")}), encoding="utf-8")
        log = root / "engine.log"
        command = [str(environment.python), "-P", str(script), str(root / "job.json")]
        logger.info("starting vLLM %s on %s", environment.vllm, document["model"])
        code = _run(command, dict(variables), log, timeout_s, ended or Event())
        if code != 0 or not (root / "result.json").is_file():
            raise engine_failure(f"vLLM failed on {document['model']}", code, log)
        result: dict[str, Any] = json.loads((root / "result.json").read_text(encoding="utf-8"))
        logger.info("vLLM done: loaded in %.1f s, %.1f s in all", result["load_s"], result["total_s"])
        return result


def _run(command: list[str], variables: dict[str, str], log: Path, timeout_s: float, ended: Event) -> int:
    started = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=variables, start_new_session=True)
    try:
        while (code := process.poll()) is None and not ended.wait(_POLL_S):
            if time.monotonic() - started > timeout_s:
                why = f"{time.monotonic() - started:.0f} s passed; its last lines:\n{last_lines(log)}"
                fix = "allow more time, or a machine with more cores"
                raise Fp8PipeError("vLLM did not finish in time", why=why, fix=fix)
        if code is None:
            raise Fp8PipeError("vLLM was ended", why="the validation ended before it")
        return code
    finally:
        end_group(process)
