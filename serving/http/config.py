"""What a service can be told, in one frozen configuration: the command line's options are overrides of it."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from pydantic import Field, model_validator

from fp8pipe.core.config import FrozenConfig

__all__ = ["Provider", "ServeConfig"]


class Provider(StrEnum):
    """Where ONNX Runtime computes."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"
    TENSORRT = "tensorrt"


class ServeConfig(FrozenConfig):
    """One service."""

    host: str = Field(default="127.0.0.1", description="address to listen on; 0.0.0.0 for every interface")
    port: int = Field(default=8000, ge=0, le=65535, description="port; 0 takes a free one")
    api_key_file: Path | None = Field(default=None, description="file of hashed API keys; none: open to everybody")
    max_body_mb: float = Field(default=16, gt=0, le=4096, description="largest request body, megabytes (10^6 bytes)")
    max_total_body_mb: float = Field(
        default=512, gt=0, description="bodies held at once, of all connections, megabytes; more are answered 503"
    )
    body_timeout_s: float = Field(default=30, gt=0, description="a body must have arrived by then, seconds")
    header_timeout_s: float = Field(default=10, gt=0, description="so must the headers, once begun, seconds")
    keep_alive_s: float = Field(default=75, gt=0, description="an idle connection is closed after, seconds")
    request_timeout_s: float = Field(default=30, gt=0, description="longest wait for the engine, seconds")
    linger_s: float = Field(default=2, ge=0, description="after SIGTERM new requests are still taken for, seconds")
    max_connections: int = Field(default=1000, gt=0, description="open connections; more are answered 503")
    rate_limit: float | None = Field(default=None, gt=0, description="requests a second of a key or address")
    rate_burst: int | None = Field(default=None, gt=0, description="requests at once; default: two seconds' worth")
    cors_origins: tuple[str, ...] = Field(default=(), description="origins whose pages may call; none by default")
    access_log: bool = Field(default=True, description="one JSON line a request on stderr")
    page: bool = Field(default=True, description="serve the web page at /")
    max_batch: int | None = Field(default=None, gt=0, le=1024, description="images at once; default: measured")
    threads: int | None = Field(default=None, gt=0, description="threads within an operator; default: measured")
    streams: int | None = Field(default=None, gt=0, le=256, description="batches run at once; default: measured")
    max_wait_ms: float = Field(default=2, ge=0, description="a batch waits for more images at most, milliseconds")
    queue: int = Field(default=256, gt=0, description="images that may wait; more are answered 503")
    max_pixels: int = Field(default=50_000_000, gt=0, description="largest picture, width times height")
    max_images: int = Field(default=64, gt=0, description="images in one request")
    provider: Provider = Field(default=Provider.AUTO, description="where ONNX Runtime computes")
    inexact_batches: bool = Field(
        default=False, description="allow batch sizes whose rows differ in bits from the same images run alone"
    )

    @model_validator(mode="after")
    def _one_body_fits(self) -> ServeConfig:
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
