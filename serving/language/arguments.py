"""What vLLM is started with, read from the export's manifest: nothing here is left to vLLM's guesses.

vLLM listens on a Unix socket in a private directory, so that no other user of the machine reaches it past the API keys,
and no port can be taken by another process between two starts.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from fp8pipe.artifact import Artifact
from fp8pipe.config import FrozenConfig
from fp8pipe.errors import MissingCapabilityError
from serving.language.supervisor import SupervisorConfig
from serving.language.upstream import KEEP_ALIVE_S
from serving.vllm.environment import VllmEnvironment, subprocess_environment

__all__ = ["LanguageConfig", "engine_command", "engine_environment"]


class LanguageConfig(FrozenConfig):
    """How vLLM runs below the service."""

    vllm_python: str | None = Field(default=None, description="vLLM's interpreter; found when not given")
    served_name: str | None = Field(default=None, min_length=1, description="model name; the directory's by default")
    dtype: str = Field(default="bfloat16", description="compute dtype: bfloat16, float16, float32 or auto")
    max_model_len: int | None = Field(
        default=None, ge=16, description="context, tokens; default: the model's, if it fits"
    )
    max_num_seqs: int | None = Field(default=None, ge=1, description="requests at once; default: vLLM's choice")
    kv_cache_gib: int = Field(default=1, ge=1, description="key/value cache on a CPU, GiB")
    enforce_eager: bool = Field(default=False, description="do not compile: starts sooner, serves slower")
    extra: tuple[str, ...] = Field(default=(), description="more arguments for vLLM's server, as they are")
    supervision: SupervisorConfig = Field(default=SupervisorConfig(), description="starts, probes and restarts")

    def name_of(self, artifact: Artifact) -> str:
        """The model's name in the API."""
        return self.served_name or artifact.root.absolute().name


def engine_command(environment: VllmEnvironment, artifact: Artifact, config: LanguageConfig, socket: Path) -> list[str]:
    """The command line of vLLM's server.

    Raises:
        MissingCapabilityError: FP8 codes on a CPU without the plugin, which stock vLLM refuses or runs very slowly.
    """
    quantized = artifact.manifest.number_format is not None
    if quantized and environment.on_cpu and environment.plugin is None:
        raise MissingCapabilityError(
            f"{environment.python} lacks the plugin that runs FP8 on CPUs",
            why="fp8pipe-vllm-cpu is not installed there",
            fix="run scripts/setup_vllm.sh, or install serving/vllm_plugin there",
        )
    length = -1 if config.max_model_len is None else config.max_model_len  # -1: as much as the memory holds
    command = [str(environment.python), "-P", "-m", "vllm.entrypoints.openai.api_server", "--uds", str(socket)]
    command += ["--model", str(artifact.root.absolute()), "--served-model-name", config.name_of(artifact)]
    command += ["--dtype", config.dtype, "--max-model-len", str(length), "--disable-uvicorn-access-log"]
    if config.max_num_seqs is not None:
        command += ["--max-num-seqs", str(config.max_num_seqs)]
    if config.enforce_eager:
        command.append("--enforce-eager")
    return [*command, *config.extra]


def engine_environment(config: LanguageConfig) -> dict[str, str]:
    """vLLM's environment. No API key of vLLM's own: requests are let in before they reach it."""
    env = subprocess_environment(
        VLLM_CPU_KVCACHE_SPACE=str(config.kv_cache_gib), VLLM_HTTP_TIMEOUT_KEEP_ALIVE=str(KEEP_ALIVE_S)
    )
    env.pop("VLLM_API_KEY", None)
    return env
