"""The settings with which `fp8pipe serve` starts vLLM, as far as they affect what it computes.

They are one data model, so that a validation runs vLLM exactly as the service does, and the validation record, model
card, report and `/v1/artifact` describe the settings in the same way. Settings that the service adds (socket, names,
timeouts) do not affect results and are not part of it.
"""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from exporters.vllm.device import device_in_words, vllm_gpu
from exporters.vllm.environment import VllmEnvironment, subprocess_environment
from fp8pipe.core.config import CONFIG_ONLY, Flag, FrozenConfig

__all__ = ["ServingForm", "declared_cache"]

_BY_VLLM: Final = Flag(default="vLLM's choice")
_CPU_CACHE: Final = "VLLM_CPU_KVCACHE_SPACE"
_ACTIVATIONS: Final = "FP8PIPE_VLLM_ACTIVATIONS"
# Top-level keys of config.json from which vLLM derives the context length; ALiBi models may have none of them.
_CONTEXT: Final = frozenset(
    ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length", "max_target_positions",
     "max_sequence_length", "max_seq_length", "seq_len", "n_ctx", "text_config")
)  # fmt: skip
_UNSTATED_LENGTH: Final = 2048
# The service sets these itself: other values would move vLLM to an address unknown to the proxy, or bypass API keys.
_OURS: Final = frozenset(
    ("--model", "--served-model-name", "--uds", "--host", "--port", "--api-key", "--ssl-keyfile", "--ssl-certfile",
     "--ssl-ca-certs", "--ssl-cert-reqs", "--root-path", "--api-server-count", "--headless", "--config",
     "--disable-uvicorn-access-log")
)  # fmt: skip
# Options of `fp8pipe serve` that are not fields of the form, and vLLM's short names for those that are.
_NODES: Final = frozenset(("--nnodes", "--node-rank", "--master-addr", "--master-port", "-n", "-r"))
_SHORT: Final = {"-tp": "--tensor-parallel-size", "-pp": "--pipeline-parallel-size"}
_BACKENDS: Final = frozenset(("--distributed-executor-backend", "--data-parallel-backend", "-dpb"))
_FP4_SINCE: Final = (10, 0)  # compute capability from which on vLLM multiplies inputs in NVFP4
_LOCAL: Final = ("mp", "uni")  # backends whose workers are processes of this machine


class ServingForm(FrozenConfig):
    """How vLLM is run. Unset fields are left to vLLM, except `dtype` and `max_model_len`, which have defaults here."""

    dtype: Literal["bfloat16", "float16", "float32", "auto"] = Field(default="bfloat16", description="Compute dtype")
    max_model_len: Annotated[int | None, Flag(default="as much as fits into memory")] = Field(
        default=None, ge=16, description="Context length, tokens"
    )
    kv_cache_dtype: Annotated[str | None, _BY_VLLM] = Field(
        default=None,
        pattern=r"[a-z0-9_]+",
        description="Dtype of the key/value cache; vLLM's version determines which exist",
    )
    enforce_eager: Annotated[bool | None, Flag(default="on a CPU")] = Field(
        default=None, description="Do not compile the model: starts faster, serves slower"
    )
    max_num_seqs: Annotated[int | None, _BY_VLLM] = Field(
        default=None, ge=1, description="Requests computed concurrently"
    )
    tensor_parallel_size: Annotated[int | None, Flag(default="1")] = Field(
        default=None, ge=1, description="Number of devices that each layer is split over"
    )
    pipeline_parallel_size: Annotated[int | None, Flag(default="1")] = Field(
        default=None, ge=1, description="Number of groups of such devices, each of which has a part of the layers"
    )
    gpu_memory_utilization: Annotated[float | None, _BY_VLLM] = Field(
        default=None, gt=0, le=1, description="Fraction of the GPU's memory that vLLM takes; on a CPU, of the machine's"
    )
    kv_cache_gib: Annotated[int | None, Flag(default="1")] = Field(
        default=None, ge=1, description="Size of the key/value cache on a CPU, GiB"
    )
    extra: Annotated[tuple[str, ...], CONFIG_ONLY] = Field(
        default=(), description="More arguments for vLLM's server, passed unchanged"
    )

    @field_validator("extra")
    @classmethod
    def _not_ours(cls, extra: tuple[str, ...]) -> tuple[str, ...]:
        # Refuse extra arguments that the service sets itself, or that have a field of their own.
        if extra and not extra[0].startswith("-"):
            raise ValueError(f"{extra[0]!r} is not an option; give vLLM's own options after '--'")
        for argument, after in pairwise((*extra, "")):
            name, _, value = argument.partition("=")
            flag = name.partition(".")[0].replace("_", "-")  # vLLM takes `_` for `-`, and `--option.key` for JSON
            for option in _meant(flag):
                said = option if flag.startswith(option) or flag in _SHORT else f"{flag}, short for {option},"
                if option in _OURS:
                    raise ValueError(f"{said} is set by fp8pipe and cannot be given")
                if option not in _BACKENDS:
                    raise ValueError(f"{said} is an option of this command: give it before '--'")
                if (value or after) not in _LOCAL:
                    raise ValueError(
                        f"{flag} {value or after} cannot be given: its workers could load the model on nodes where "
                        "nothing has hashed it; run this command on each node, with --nnodes and --node-rank"
                    )
        return extra

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.kv_cache_gib is not None and self.gpu_memory_utilization is not None:
            raise ValueError(
                "kv_cache_gib and gpu_memory_utilization both set the size of the key/value cache: give only one"
            )
        return self

    def with_defaults(self, model: Path, *, on_cpu: bool) -> Self:
        """A copy in which unset options have the defaults for this machine and model.

        On a CPU the model is compiled only if requested. A context length is set if the model's config.json has none.
        An FP8 key/value cache that the model declares is named, as vLLM would use it anyway.
        """
        chosen: dict[str, Any] = {} if self.enforce_eager is not None else {"enforce_eager": on_cpu}
        if self.max_model_len is None and not _CONTEXT & json.loads((model / "config.json").read_bytes()).keys():
            chosen["max_model_len"] = _UNSTATED_LENGTH
        if self.kv_cache_dtype in (None, "auto") and declared_cache(model):
            chosen["kv_cache_dtype"] = "fp8"
        return self.model_copy(update=chosen) if chosen else self

    @property
    def devices(self) -> int:
        """Number of devices that compute the model, on all nodes together."""
        return (self.tensor_parallel_size or 1) * (self.pipeline_parallel_size or 1)

    @property
    def rounds_cache(self) -> bool:
        """Whether keys and values are stored as E4M3 codes."""
        return self.kv_cache_dtype in ("fp8", "fp8_e4m3")

    def options(self) -> list[str]:
        """The settings that were given, as command-line options of `fp8pipe serve`."""
        given: list[str] = []
        for name in sorted(ServingForm.model_fields.keys() & self.model_fields_set - {"extra"}):
            value = getattr(self, name)
            if isinstance(value, bool):
                given.append(_flag(name if value else f"no_{name}"))
            elif value is not None:
                given += [_flag(name), str(value)]
        return [*given, "--", *self.extra] if self.extra else given

    def arguments(self) -> list[str]:
        """vLLM's arguments for these settings."""
        # -1 is the longest context that fits into memory; by default vLLM refuses to start if the full one does not.
        command = ["--dtype", self.dtype, "--max-model-len", str(self.max_model_len or -1)]
        for name in _PASSED:
            value = getattr(self, name)
            if value is not None:
                command += [_flag(name), str(value)]
        if self.enforce_eager:
            command.append("--enforce-eager")
        return [*command, *self.extra]

    def variables(self, **more: str) -> dict[str, str]:
        """The environment variables of vLLM's processes, with `more` added."""
        env = subprocess_environment(**more)
        if self.kv_cache_gib is not None:
            env[_CPU_CACHE] = str(self.kv_cache_gib)
        elif self.gpu_memory_utilization is not None:
            env.pop(_CPU_CACHE, None)  # on a CPU the variable would override the option
        env.pop("VLLM_API_KEY", None)  # API keys are checked before requests reach vLLM
        return env

    def rounds_activations(self, environment: VllmEnvironment, model: Path | None = None) -> bool:
        """Whether inputs of quantized layers are quantized as the checkpoint in `model` declares; in FP8 without one.

        The CPU plugin quantizes them only if the environment variable FP8PIPE_VLLM_ACTIVATIONS is `quant`. vLLM's own
        kernels always do, except on GPUs without arithmetic in that format.
        """
        if environment.dequantizes:
            return os.environ.get(_ACTIVATIONS, "").strip().lower() == "quant"
        device = vllm_gpu(environment)
        if model is not None and _declared_fp4(model):
            return device is None or device.capability >= _FP4_SINCE
        return device is None or device.fp8

    def in_words(self, environment: VllmEnvironment, model: Path | None = None) -> str:
        """A description of the settings that affect results, which validation records store and compare.

        For example `on a CPU: bfloat16, compiled, activations not rounded`; on a GPU it names the GPU. `model` is as in
        `rounds_activations`.

        Raises:
            MissingCapabilityError: vLLM is built for a GPU and finds none.
        """
        said = [f"on {device_in_words(environment)}: {self.dtype}", "eager" if self.enforce_eager else "compiled"]
        rounds = self.rounds_activations(environment, model)
        said.append(f"activations {'rounded as the checkpoint declares' if rounds else 'not rounded'}")
        switched_off = environment.on_cpu and environment.plugin is not None and not environment.dequantizes
        said += ["without the plugin"] if switched_off else []
        said += [f"key/value cache in {self.kv_cache_dtype}"] if self.kv_cache_dtype else []
        said += [f"{self.tensor_parallel_size} devices"] if (self.tensor_parallel_size or 1) > 1 else []
        said += [f"{self.pipeline_parallel_size} pipeline stages"] if (self.pipeline_parallel_size or 1) > 1 else []
        said += [f"with {' '.join(self.extra)}"] if self.extra else []
        return ", ".join(said)


_PASSED: Final = (
    "kv_cache_dtype", "max_num_seqs", "tensor_parallel_size", "pipeline_parallel_size", "gpu_memory_utilization",
)  # fmt: skip
_TYPED: Final = ("dtype", "max_model_len", "enforce_eager", *_PASSED)


def declared_cache(model: Path) -> bool:
    """Whether a checkpoint for vLLM declares an FP8 key/value cache."""
    config = json.loads((model / "config.json").read_bytes())
    return bool((config.get("quantization_config") or {}).get("kv_cache_scheme"))


def _declared_fp4(model: Path) -> bool:
    """Whether a checkpoint for vLLM declares inputs in NVFP4."""
    block = json.loads((model / "config.json").read_bytes()).get("quantization_config") or {}
    groups = (block.get("config_groups") or {}).values()
    return any((group.get("input_activations") or {}).get("num_bits") == 4 for group in groups)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _meant(flag: str) -> list[str]:
    """The options not to be given that vLLM could take `flag` for: its parser accepts abbreviations, and `-n2`."""
    if not flag.startswith("-") or flag in ("-", "--"):
        return []
    typed = {_flag(name) for name in _TYPED} | {f"--no-{name[2:]}" for name in map(_flag, _TYPED)}
    refused = {name: name for name in _OURS | _NODES | _BACKENDS | typed} | _SHORT
    return sorted(
        {option for name, option in refused.items()
         if (name.startswith(flag) and flag != "-dp")  # an option of its own, --data-parallel-size
         or (len(name) == 2 and flag.startswith(name))}
    )  # fmt: skip
