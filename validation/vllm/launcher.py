"""Start vLLM's OpenAI server on an export, wait until it answers, and end all of it afterwards.

The server is `python -P -m vllm.entrypoints.openai.api_server` in its own session: it starts an engine and workers,
and ending the session's group ends them too. `-P` keeps the working directory off the import path, so that a
user's folder called `vllm` is not imported. An API key travels in the environment, where other users of the
machine do not see it, and not on the command line.
"""

from __future__ import annotations

import logging
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import Field

from exporters.vllm.environment import (
    end_group,
    engine_failure,
    find_vllm_python,
    inspect_environment,
    last_lines,
    subprocess_environment,
)
from fp8pipe.core.config import FrozenConfig
from fp8pipe.core.errors import ConfigurationError, Fp8PipeError
from validation.vllm.expected import open_export

__all__ = ["ServerOptions", "free_port", "open_local", "server", "server_command"]

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
    max_model_len: int = Field(default=1024, ge=16, description="context length, tokens")
    max_num_seqs: int = Field(default=8, ge=1, description="requests served at once")
    kv_cache_gib: int = Field(default=1, ge=1, description="key/value cache on a CPU, GiB")
    enforce_eager: bool = Field(default=True, description="do not compile: starts minutes sooner, serves slower")
    extra: tuple[str, ...] = Field(default=(), description="more arguments for vLLM's server, as they are")
    timeout_s: float = Field(default=600.0, gt=0, description="longest wait for the server to answer, seconds")


@contextmanager
def server(
    export: Path, options: ServerOptions | None = None, *, vllm_python: str | None = None, verify: bool = True
) -> Iterator[str]:
    """Serve an export for the length of the `with` block.

    Args:
        export: directory of an export to vLLM.
        options: see ServerOptions.
        vllm_python: vLLM's interpreter; found when None.
        verify: hash every file of the export before serving it.

    Yields:
        the base URL, such as `http://127.0.0.1:8000`; the API is under `/v1`.

    Raises:
        BadArtifactError: the export is damaged, or vLLM cannot load it (its last lines are shown).
        ConfigurationError: the port is taken.
        MissingCapabilityError: no vLLM.
        Fp8PipeError: it did not answer within `timeout_s`.
    """
    chosen = options or ServerOptions()
    artifact = open_export(Path(export), verify=verify)
    environment = inspect_environment(find_vllm_python(vllm_python))
    port = chosen.port or free_port(chosen.host)
    _check_port(chosen.host, port)
    command = server_command(environment.python, artifact.root, chosen, port)
    variables = {"VLLM_CPU_KVCACHE_SPACE": str(chosen.kv_cache_gib)}
    if chosen.api_key is not None:
        variables["VLLM_API_KEY"] = chosen.api_key
    url = f"http://{_reachable(chosen.host)}:{port}"
    with tempfile.TemporaryDirectory(prefix="fp8pipe-server-") as folder:
        log = Path(folder) / "server.log"
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


def server_command(python: Path, export: Path, options: ServerOptions, port: int) -> list[str]:
    """The server's command line; holds no secret."""
    command = [str(python), "-P", "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(export.absolute()), "--served-model-name", options.served_name or export.absolute().name]
    command += ["--host", options.host, "--port", str(port), "--dtype", options.dtype]
    command += ["--max-model-len", str(options.max_model_len), "--max-num-seqs", str(options.max_num_seqs)]
    if options.enforce_eager:
        command.append("--enforce-eager")
    return [*command, *options.extra]


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket(_family(host), socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def _reachable(host: str) -> str:
    """The address under which this machine reaches a server that listens on `host`."""
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
    """Until `/health` answers, the server ends, or the time is up."""
    started = reported = time.monotonic()
    while not _healthy(url):
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
    """The reply to a request to this machine; a proxy in the environment must not see, or answer, it."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=timeout_s)


def _healthy(url: str) -> bool:
    try:
        with open_local(f"{url}/health", timeout_s=2) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False
