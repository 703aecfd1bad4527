"""What a service can be told, in one frozen configuration: the command line's options are overrides of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from fp8pipe.core.config import Flag, FrozenConfig

__all__ = ["ServeConfig"]


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
    record: Annotated[Path | None, Flag(default="beside the export")] = Field(
        default=None, description="Record of the export's validation, which must say ACCEPT"
    )
    unvalidated: bool = Field(
        default=False, description="Serve without an ACCEPT for this export, engine and form; every answer says so"
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
