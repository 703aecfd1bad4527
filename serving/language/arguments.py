"""The command line and the environment that vLLM is started with.

vLLM listens on a Unix socket in a private directory, so that no other user of the machine reaches it past the API keys,
and no port can be taken by another process between two starts.
"""

from __future__ import annotations

from pathlib import Path

from exporters.vllm.environment import VllmEnvironment, subprocess_environment
from fp8pipe.artifact import Artifact
from fp8pipe.core.errors import MissingCapabilityError
from serving.language.config import LanguageConfig
from serving.language.upstream import KEEP_ALIVE_S

__all__ = ["engine_command", "engine_environment"]

_CPU_CACHE = "VLLM_CPU_KVCACHE_SPACE"


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
    command = [str(environment.python), "-P", "-m", "vllm.entrypoints.openai.api_server", "--uds", str(socket)]
    command += ["--model", str(artifact.root.absolute()), "--served-model-name", config.name_of(artifact)]
    return [*command, "--disable-uvicorn-access-log", *config.arguments()]


def engine_environment(config: LanguageConfig) -> dict[str, str]:
    """vLLM's environment. No API key of vLLM's own: requests are let in before they reach it."""
    env = subprocess_environment(VLLM_HTTP_TIMEOUT_KEEP_ALIVE=str(KEEP_ALIVE_S))
    if config.kv_cache_gib is not None:
        env[_CPU_CACHE] = str(config.kv_cache_gib)
    elif config.gpu_memory_utilization is not None:
        env.pop(_CPU_CACHE, None)  # on a CPU it would win over the option
    env.pop("VLLM_API_KEY", None)
    return env
