"""What a TensorRT export may be asked for: one frozen model, written whole into the export's manifest."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field, field_validator, model_validator

from exporters.tensorrt.enterprise import EnterpriseSettings
from exporters.tensorrt.formats import TrtFormat
from exporters.tensorrt.rtx import CAPABILITIES
from fp8pipe.core.config import FrozenConfig

__all__ = ["Base", "Builder", "TrtExportOptions", "known_capabilities"]


class Builder(StrEnum):
    """Who compiles engines.

    TensorRT for RTX, on any machine; TensorRT (`enterprise`), for the GPU of this one; or nobody: the graph alone.
    """

    RTX = "rtx"
    ENTERPRISE = "enterprise"
    NONE = "none"


class Base(StrEnum):
    """The type of everything that is not quantized."""

    FP16 = "fp16"
    FP32 = "fp32"


def known_capabilities(value: tuple[str, ...]) -> tuple[str, ...]:
    """Each once, in the order given.

    Raises:
        ValueError: none, or one that the builder cannot compile for.
    """
    unknown = [capability for capability in value if capability not in CAPABILITIES]
    if unknown or not value:
        raise ValueError(f"{', '.join(unknown) or 'none'}: choose from {', '.join(CAPABILITIES)}")
    return tuple(dict.fromkeys(value))


class TrtExportOptions(FrozenConfig):
    """Options of one export."""

    format: TrtFormat | None = Field(
        None, description="fp8, int8, nvfp4, int8-, int4- or nvfp4-weight-only; the artifact's own when not given"
    )
    builder: Builder = Field(Builder.RTX, description="rtx (anywhere), enterprise (this GPU), none (graph alone)")
    base: Base = Field(Base.FP16, description="fp16 or fp32: the type of what is not quantized")
    compute_capabilities: tuple[str, ...] = Field(
        ("8.9", "12.0"), description="GPUs that rtx compiles for; when not given, 12.0 alone for NVFP4"
    )
    batch: tuple[int, int, int] = Field((1, 8, 32), description="smallest, usual and largest batch")
    require: bool = Field(True, description="refuse engines with a product in another precision (true or false)")
    enterprise: EnterpriseSettings = Field(EnterpriseSettings(), description="how TensorRT's builder is set up")
    pack: bool = Field(True, description="store engines compressed with xz, as `.engine.xz` (true or false)")
    force: bool = Field(False, description="replace an existing output directory (true or false)")

    @field_validator("compute_capabilities")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return known_capabilities(value)

    @model_validator(mode="after")
    def _ordered(self) -> TrtExportOptions:
        low, usual, high = self.batch
        if not 1 <= low <= usual <= high:
            raise ValueError(f"batch {self.batch}: three numbers from 1, none smaller than the one before")
        return self
