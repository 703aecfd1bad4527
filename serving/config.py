"""What a service can be told, as frozen configurations: the command line's options are overrides of them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from fp8pipe.core.config import CONFIG_ONLY, Flag, FrozenConfig


class ServeConfig(FrozenConfig):
    """One service, whatever it serves."""

    host: str = Field(default="127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface")
    port: int = Field(default=8000, ge=0, le=65535, description="Port; 0 takes a free one")
    api_key_file: Annotated[Path | None, Flag(default="anybody may call")] = Field(
        default=None, description="File of hashed API keys (fp8pipe serve-key)"
    )
    max_body_mb: float = Field(default=16, gt=0, le=4096, description="Largest request body, megabytes (10^6 bytes)")
    max_total_body_mb: float = Field(
        default=512, gt=0, description="Bodies held at once, of all connections, megabytes; more are answered 503"
    )
    body_timeout_s: float = Field(default=30, gt=0, description="A request's body must have arrived by then, seconds")
    header_timeout_s: float = Field(
        default=10, gt=0, description="A request's headers, once begun, must have arrived by then, seconds"
    )
    keep_alive_s: float = Field(default=75, gt=0, description="An idle connection is closed after, seconds")
    request_timeout_s: float = Field(default=30, gt=0, description="Longest wait for the engine, seconds")
    linger_s: float = Field(default=2, ge=0, description="After SIGTERM new requests are still taken for, seconds")
    max_connections: int = Field(default=1000, gt=0, description="Open connections; more are answered 503")
    rate_limit: Annotated[float | None, Flag(default="no limit")] = Field(
        default=None, gt=0, description="Requests per second of a key or address"
    )
    rate_burst: Annotated[int | None, Flag(default="two seconds' worth")] = Field(
        default=None, gt=0, description="Requests at once of a key or address"
    )
    cors_origins: Annotated[tuple[str, ...], Flag("cors-origin", "none")] = Field(
        default=(), description="An origin whose pages may call; repeatable"
    )
    access_log: bool = Field(default=True, description="One JSON line per request on stderr")
    page: bool = Field(default=True, description="Serve the web page at /")

    @model_validator(mode="after")
    def _one_body_fits(self) -> Self:
        if self.max_total_body_mb < self.max_body_mb:
            raise ValueError(f"max_total_body_mb ({self.max_total_body_mb:g}) is less than max_body_mb "
                             f"({self.max_body_mb:g})")  # fmt: skip
        return self

    @property
    def max_body_bytes(self) -> int:
        """Largest request body, bytes."""
        return int(self.max_body_mb * 1_000_000)

    @property
    def max_total_body_bytes(self) -> int:
        """All bodies together, bytes."""
        return int(self.max_total_body_mb * 1_000_000)


_MEASURED: Final = Flag(default="measured")


class Provider(StrEnum):
    """Where ONNX Runtime computes."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    TENSORRT = "tensorrt"


class VisionConfig(ServeConfig):
    """A service of a vision model."""

    max_batch: Annotated[int | None, _MEASURED] = Field(default=None, gt=0, le=1024, description="Images at once")
    threads: Annotated[int | None, _MEASURED] = Field(default=None, gt=0, description="Threads within an operator")
    streams: Annotated[int | None, _MEASURED] = Field(
        default=None, gt=0, le=256, description="Batches run at once, on a CPU"
    )
    max_wait_ms: float = Field(default=2, ge=0, description="A batch waits for more images at most, milliseconds")
    queue: int = Field(default=256, gt=0, description="Images that may wait; more are answered 503")
    max_pixels: int = Field(default=50_000_000, gt=0, description="Largest picture, width times height")
    max_images: int = Field(default=64, gt=0, description="Images in one request")
    provider: Provider = Field(default=Provider.AUTO, description="Where ONNX Runtime computes")
    inexact_batches: bool = Field(
        default=False, description="Allow batch sizes whose rows differ in bits from the same images run alone"
    )


if TYPE_CHECKING:
    from fp8pipe.artifact import Artifact


_BY_VLLM: Final = Flag(default="vLLM's choice")

# The service sets these itself: another value would put vLLM where nobody looks for it, or past the API keys.
_OURS = frozenset(
    ("--model", "--served-model-name", "--uds", "--host", "--port", "--api-key", "--ssl-keyfile", "--ssl-certfile",
     "--ssl-ca-certs", "--ssl-cert-reqs", "--root-path", "--api-server-count", "--headless", "--config",
     "--disable-uvicorn-access-log")
)  # fmt: skip


class SupervisorConfig(FrozenConfig):
    """Times of supervision."""

    start_timeout_s: float = Field(default=1800, gt=0, description="Longest start, seconds")
    probe_every_s: float = Field(default=0.5, gt=0, description="Between looks at its health, seconds")
    probe_timeout_s: float = Field(default=10, gt=0, description="A health probe must be answered by then, seconds")
    probe_failures: int = Field(default=3, ge=1, description="Unanswered probes in a row after which it is killed")
    engine_timeout_s: Annotated[float, Flag("engine-timeout-s")] = Field(
        default=120, gt=0, description="An engine asked for a token that makes none for so long is killed, seconds"
    )
    engine_probe_every_s: float = Field(default=10, gt=0, description="Between requests for one token, seconds")
    first_delay_s: float = Field(default=1, gt=0, description="Before the first restart, seconds; doubles each time")
    longest_delay_s: float = Field(default=60, gt=0, description="Between restarts at most, seconds")
    steady_s: float = Field(default=300, gt=0, description="After this long up, crashes are counted anew, seconds")
    stop_grace_s: float = Field(default=10, ge=0, description="From SIGTERM to SIGKILL, seconds")


class LanguageConfig(FrozenConfig):
    """How vLLM runs below the service. What is not given is left to vLLM, but for `dtype` and `max_model_len`."""

    vllm_python: Annotated[str | None, Flag(default="found")] = Field(
        default=None, description="Python of the environment with vLLM"
    )
    served_model_name: Annotated[str | None, Flag(default="the directory's")] = Field(
        default=None, min_length=1, description="Model name in the API"
    )
    dtype: Literal["bfloat16", "float16", "float32", "auto"] = Field(default="bfloat16", description="Compute dtype")
    max_model_len: Annotated[int | None, Flag(default="the longest that the memory holds")] = Field(
        default=None, ge=16, description="Context, tokens"
    )
    kv_cache_dtype: Annotated[str | None, _BY_VLLM] = Field(
        default=None, pattern=r"[a-z0-9_]+", description="Dtype of the key/value cache; what there is depends on vLLM"
    )
    enforce_eager: bool = Field(default=False, description="Do not compile: starts sooner, serves slower")
    max_num_seqs: Annotated[int | None, _BY_VLLM] = Field(default=None, ge=1, description="Requests computed at once")
    tensor_parallel_size: Annotated[int | None, Flag(default="1")] = Field(
        default=None, ge=1, description="Devices that share each layer"
    )
    gpu_memory_utilization: Annotated[float | None, _BY_VLLM] = Field(
        default=None, gt=0, le=1, description="Part of a device's memory that vLLM takes; on a CPU, of the machine's"
    )
    kv_cache_gib: Annotated[int | None, Flag(default="1")] = Field(
        default=None, ge=1, description="Key/value cache on a CPU, GiB"
    )
    request_timeout_s: Annotated[float | None, Flag(default="no limit")] = Field(
        default=None, gt=0, description="An answer, or a stream's begin, must come by then, seconds"
    )
    drain_seconds: float = Field(
        default=60, ge=0, description="After SIGTERM, what was accepted may take so long, seconds"
    )
    extra: Annotated[tuple[str, ...], CONFIG_ONLY] = Field(
        default=(), description="More arguments for vLLM's server, as they are"
    )
    supervision: SupervisorConfig = Field(default_factory=SupervisorConfig, description="Starts, probes and restarts")

    @field_validator("extra")
    @classmethod
    def _not_ours(cls, extra: tuple[str, ...]) -> tuple[str, ...]:
        if extra and not extra[0].startswith("-"):
            raise ValueError(f"{extra[0]!r} is no option; vLLM's own options follow after '--'")
        typed = {_flag(name) for name in _TYPED} | {f"--no-{name[2:]}" for name in map(_flag, _TYPED)}
        for argument in extra:
            flag = argument.split("=", 1)[0].replace("_", "-")
            if flag in _OURS:
                raise ValueError(f"{flag} is set by the service")
            if flag in typed:
                raise ValueError(f"{flag} is an option of this command: give it before '--'")
        return extra

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.kv_cache_gib is not None and self.gpu_memory_utilization is not None:
            raise ValueError("kv_cache_gib and gpu_memory_utilization both say how much memory: give one")
        return self

    def name_of(self, artifact: Artifact) -> str:
        """The model's name in the API."""
        return self.served_model_name or artifact.root.absolute().name

    def arguments(self) -> list[str]:
        """vLLM's arguments for these settings."""
        # -1: as much as the memory holds. Without it vLLM refuses to start where the model's full context does not fit.
        command = ["--dtype", self.dtype, "--max-model-len", str(self.max_model_len or -1)]
        for name in ("kv_cache_dtype", "max_num_seqs", "tensor_parallel_size", "gpu_memory_utilization"):
            value = getattr(self, name)
            if value is not None:
                command += [_flag(name), str(value)]
        if self.enforce_eager:
            command.append("--enforce-eager")
        return [*command, *self.extra]


_TYPED = (
    "dtype", "max_model_len", "kv_cache_dtype", "enforce_eager", "max_num_seqs", "tensor_parallel_size",
    "gpu_memory_utilization",
)  # fmt: skip


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
