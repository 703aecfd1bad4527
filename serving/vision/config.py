"""What the service of a vision export can be told beyond what every service can."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

from pydantic import Field

from fp8pipe.core.config import Flag
from serving.http.config import ServeConfig

__all__ = ["Provider", "VisionConfig"]

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
