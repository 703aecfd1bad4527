"""What a TensorRT export may be asked for: one frozen model, written whole into the export's manifest."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Final

from pydantic import Field, field_validator, model_validator

from fp8pipe.core.config import CONFIG_ONLY, Flag, FrozenConfig
from fp8pipe.numerics.kinds import Kind

# What TensorRT for RTX compiles for, by its enumeration. Hopper is not among them.
CAPABILITIES: Final[Mapping[str, str]] = {
    "7.5": "SM75", "8.0": "SM80", "8.6": "SM86", "8.9": "SM89", "12.0": "SM120", "12.1": "SM121",
}  # fmt: skip


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


class TrtFormat(StrEnum):
    """How products are stored and multiplied.

    `fp8`, `int8`: weights and activations as trained, both products of every attention too.
    `nvfp4`: linears in NVFP4, both ends and the products of every attention in FP8, as trained.
    `int8-weight-only`, `int4-weight-only`: weights as trained, in INT8 or in INT4 blocks; activations stay float.
    `nvfp4-weight-only`: weights as trained, in NVFP4 and, at both ends, FP8; activations stay float.
    """

    FP8 = "fp8"
    INT8 = "int8"
    NVFP4 = "nvfp4"
    INT8_WEIGHT_ONLY = "int8-weight-only"
    INT4_WEIGHT_ONLY = "int4-weight-only"
    NVFP4_WEIGHT_ONLY = "nvfp4-weight-only"

    @property
    def weight_only(self) -> bool:
        """Whether activations stay float."""
        return self in (TrtFormat.INT8_WEIGHT_ONLY, TrtFormat.INT4_WEIGHT_ONLY, TrtFormat.NVFP4_WEIGHT_ONLY)

    @property
    def kind(self) -> Kind:
        """The family of the codes that it stores."""
        return _KINDS.get(self, Kind.INT)


_KINDS: Final = {
    TrtFormat.FP8: Kind.E4M3, TrtFormat.NVFP4: Kind.NVFP4, TrtFormat.NVFP4_WEIGHT_ONLY: Kind.NVFP4,
}  # fmt: skip


class EnterpriseSettings(FrozenConfig):
    """How the builder is set up; part of an engine's recipe."""

    workspace_mib: Annotated[int, Flag("workspace")] = Field(
        default=4096, gt=0, description="Enterprise: scratch memory that kernels may take, MiB"
    )
    optimization_level: int = Field(default=3, ge=0, le=5, description="Effort of the search; 3 is its default")
    version_compatible: Annotated[bool, Flag("version-compatible")] = Field(
        default=False, description="Enterprise: engines that later versions load, too"
    )

    @staticmethod
    def network_flags(version: str) -> tuple[str, ...]:
        """Names of NetworkDefinitionCreationFlag: 11 knows strongly typed networks only, 10 must be asked for one."""
        return ("STRONGLY_TYPED",) if int(version.split(".")[0]) < 11 else ()

    def builder_flags(self) -> tuple[str, ...]:
        """Names of BuilderFlag, in 10 and 11 alike; none of precision: strong typing allows none, and 11 has none."""
        return ("VERSION_COMPATIBLE",) if self.version_compatible else ()


class TrtExportOptions(FrozenConfig):
    """Options of one export."""

    format: Annotated[TrtFormat | None, Flag(default="the artifact's own")] = Field(
        None, description="fp8, int8, nvfp4, int8-, int4- or nvfp4-weight-only"
    )
    builder: Builder = Field(Builder.RTX, description="Who compiles: rtx anywhere, enterprise for this GPU, or nobody")
    base: Base = Field(Base.FP16, description="Type of what is not quantized")
    compute_capabilities: Annotated[tuple[str, ...], Flag("compute-capability", "8.9 12.0, for NVFP4 12.0")] = Field(
        ("8.9", "12.0"), description="A GPU that rtx compiles for; repeatable"
    )
    batch: tuple[int, int, int] = Field((1, 8, 32), description="Smallest, usual and largest batch")
    require: bool = Field(True, description="Refuse engines with a product in another precision")
    enterprise: EnterpriseSettings = Field(
        default_factory=EnterpriseSettings, description="How the enterprise builder is set up"
    )
    pack: bool = Field(True, description="Store engines compressed with xz, as `.engine.xz`")
    force: Annotated[bool, CONFIG_ONLY] = Field(False, description="Replace an existing output directory")

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
