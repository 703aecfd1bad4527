"""The settings of services, as frozen pydantic models; every field is also a command-line option."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Self

from pydantic import Field, model_validator

from exporters.vllm.form import ServingForm
from fp8pipe.artifact.signature import Trust
from fp8pipe.core.config import Flag, FrozenConfig
from fp8pipe.core.devices import DEVICE_HELP, DeviceName


class ServeConfig(Trust):
    """Settings common to all services, vision and language."""

    host: str = Field(default="127.0.0.1", description="Address to listen on; 0.0.0.0 for every interface")
    port: int = Field(default=8000, ge=0, le=65535, description="Port; 0 takes a free one")
    api_key_file: Annotated[Path | None, Flag(default="no key required")] = Field(
        default=None, description="File of hashed API keys (fp8pipe serve-key)"
    )
    max_body_mb: float = Field(default=16, gt=0, le=4096, description="Largest request body, megabytes (10^6 bytes)")
    max_total_body_mb: float = Field(
        default=512, gt=0, description="Largest total size of request bodies in memory, megabytes; beyond it, 503"
    )
    body_timeout_s: float = Field(default=30, gt=0, description="Longest wait for a request's body, seconds")
    header_timeout_s: float = Field(
        default=10, gt=0, description="Longest wait for a request's headers once they began, seconds"
    )
    keep_alive_s: float = Field(default=75, gt=0, description="Idle time after which a connection is closed, seconds")
    request_timeout_s: float = Field(default=30, gt=0, description="Longest wait for the engine, seconds")
    linger_s: float = Field(
        default=2, ge=0, description="Time after SIGTERM in which new requests are still accepted, seconds"
    )
    max_connections: int = Field(default=1000, gt=0, description="Largest number of open connections; beyond it, 503")
    rate_limit: Annotated[float | None, Flag(default="no limit")] = Field(
        default=None, gt=0, description="Requests per second and API key or client address"
    )
    rate_burst: Annotated[int | None, Flag(default="two seconds' worth")] = Field(
        default=None, gt=0, description="Requests in one burst per API key or client address"
    )
    cors_origins: Annotated[tuple[str, ...], Flag("cors-origin", "none")] = Field(
        default=(), description="An origin whose pages may call the API; repeatable"
    )
    record: Annotated[Path | None, Flag(default="beside the export")] = Field(
        default=None, description="Record of the export's validation, whose verdict must be ACCEPT"
    )
    unvalidated: bool = Field(
        default=False,
        description="Serve without an accepted validation of this export, engine and settings; every response says so",
    )
    device: DeviceName = Field(default="auto", description=DEVICE_HELP)
    access_log: bool = Field(default=True, description="Log one JSON line per request on stderr")
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
        """Largest total size of all request bodies in memory, bytes."""
        return int(self.max_total_body_mb * 1_000_000)


_MEASURED: Final = Flag(default="measured")


class Provider(StrEnum):
    """The execution provider of ONNX Runtime."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    TENSORRT = "tensorrt"


class VisionConfig(ServeConfig):
    """Settings of a vision service."""

    max_batch: Annotated[int | None, _MEASURED] = Field(default=None, gt=0, le=1024, description="Largest batch size")
    threads: Annotated[int | None, _MEASURED] = Field(default=None, gt=0, description="Threads per operator")
    streams: Annotated[int | None, _MEASURED] = Field(
        default=None, gt=0, le=256, description="Batches run concurrently on a CPU"
    )
    max_wait_ms: float = Field(default=2, ge=0, description="Longest time a batch waits for more images, milliseconds")
    queue: int = Field(default=256, gt=0, description="Largest number of waiting images; beyond it, 503")
    max_pixels: int = Field(default=50_000_000, gt=0, description="Largest image, pixels (width times height)")
    max_images: int = Field(default=64, gt=0, description="Largest number of images in one request")
    provider: Provider = Field(
        default=Provider.AUTO, description="Execution provider of ONNX Runtime; auto: the device's default"
    )
    inexact_batches: bool = Field(
        default=False, description="Allow batch sizes whose outputs are not bit-identical to those of images run alone"
    )

    @model_validator(mode="after")
    def _one_device(self) -> Self:
        if self.device not in ("auto", self.asked):
            raise ValueError(
                f"provider {self.provider} does not run on the device {self.device}: give only one of the two"
            )
        return self

    @property
    def asked(self) -> DeviceName:
        """The requested device: that of `provider`, or `device` if the provider is auto."""
        if self.provider is Provider.AUTO:
            return self.device
        return "cpu" if self.provider is Provider.CPU else "cuda"

    @property
    def wanted(self) -> Provider:
        """The requested provider: `provider`, or the one for `device` if the provider is auto."""
        named = {"auto": Provider.AUTO, "cpu": Provider.CPU, "cuda": Provider.CUDA}
        return named[self.device] if self.provider is Provider.AUTO else self.provider


if TYPE_CHECKING:
    from fp8pipe.artifact import Artifact


class SupervisorConfig(FrozenConfig):
    """Timeouts and intervals of the supervisor that keeps vLLM running."""

    start_timeout_s: float = Field(default=1800, gt=0, description="Longest time for a start, seconds")
    probe_every_s: float = Field(default=0.5, gt=0, description="Time between health probes, seconds")
    probe_timeout_s: float = Field(
        default=10, gt=0, description="Longest wait for the answer to a health probe, seconds"
    )
    probe_failures: int = Field(
        default=3, ge=1, description="Number of consecutive failed probes after which vLLM is killed"
    )
    engine_timeout_s: Annotated[float, Flag("engine-timeout-s")] = Field(
        default=120, gt=0, description="Time after which an engine that generates no token is killed, seconds"
    )
    engine_probe_every_s: float = Field(
        default=10, gt=0, description="Time between probes that request one token, seconds"
    )
    first_delay_s: float = Field(
        default=1, gt=0, description="Delay before the first restart, seconds; doubles each time"
    )
    longest_delay_s: float = Field(default=60, gt=0, description="Longest delay before a restart, seconds")
    steady_s: float = Field(default=300, gt=0, description="Uptime after which the delay starts over, seconds")
    stop_grace_s: float = Field(default=10, ge=0, description="Time from SIGTERM to SIGKILL, seconds")


class LanguageConfig(ServingForm):
    """How vLLM runs behind the service: the options that affect its numerical results, and operational settings."""

    vllm_python: Annotated[str | None, Flag(default="found")] = Field(
        default=None, description="Python interpreter of vLLM's environment"
    )
    served_model_name: Annotated[str | None, Flag(default="the directory's")] = Field(
        default=None, min_length=1, description="Model name in the API"
    )
    request_timeout_s: Annotated[float | None, Flag(default="no limit")] = Field(
        default=None, gt=0, description="Longest wait for an answer, or for the first bytes of a stream, seconds"
    )
    drain_seconds: float = Field(
        default=60, ge=0, description="Longest time after SIGTERM for requests already accepted, seconds"
    )
    nnodes: int = Field(default=1, ge=1, description="Number of nodes that compute the model together")
    node_rank: int = Field(default=0, ge=0, description="This node's number, from 0; node 0 answers requests")
    master_addr: Annotated[str | None, Flag(default="none")] = Field(
        default=None, min_length=1, description="With several nodes: address of node 0, as the others reach it"
    )
    master_port: int = Field(
        default=29501, ge=1, le=65535, description="Port of node 0 at which vLLM's processes of all nodes meet"
    )
    supervision: SupervisorConfig = Field(
        default_factory=SupervisorConfig, description="Timeouts and delays of starts, probes and restarts"
    )

    @model_validator(mode="after")
    def _nodes_fit(self) -> Self:
        if self.node_rank >= self.nnodes:
            raise ValueError(f"node_rank is {self.node_rank}, but {self.nnodes} node(s) are numbered from 0")
        if self.devices % self.nnodes:
            raise ValueError(
                f"tensor_parallel_size times pipeline_parallel_size is {self.devices}, which cannot be divided by "
                f"{self.nnodes} nodes"
            )
        if (self.nnodes > 1) != (self.master_addr is not None):
            raise ValueError("master_addr belongs to several nodes: give it if nnodes is more than 1, and only then")
        return self

    @property
    def devices_here(self) -> int:
        """Number of devices that compute the model on this node."""
        return self.devices // self.nnodes

    def node_arguments(self) -> list[str]:
        """vLLM's arguments that make this node one of several; none if it is alone."""
        if self.master_addr is None:
            return []
        numbers = ("--nnodes", str(self.nnodes), "--node-rank", str(self.node_rank))
        return [*numbers, "--master-addr", self.master_addr, "--master-port", str(self.master_port)]

    def name_of(self, artifact: Artifact) -> str:
        """The model's name in the API."""
        return self.served_model_name or artifact.root.absolute().name

    @property
    def form(self) -> ServingForm:
        """Only the options that affect numerical results, which a validation record stores."""
        return ServingForm.model_validate({name: getattr(self, name) for name in ServingForm.model_fields})
