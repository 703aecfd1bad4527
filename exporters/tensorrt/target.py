"""The target `trt` for vision models: a strongly typed Q/DQ graph, and engines of TensorRT.

Defines the export options, all of which are recorded in the manifest, and the details that the manifest adds to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, Final

from pydantic import AfterValidator, Field, model_validator

from exporters.graph.formats import GraphDetails
from exporters.target import Engine, ExportTarget, Service
from exporters.tensorrt.recipe import EngineRecipe
from fp8pipe.artifact.kinds import VIT_KIND
from fp8pipe.core.config import CONFIG_ONLY, Flag, FrozenConfig
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.numerics.kinds import Kind

KIND: Final = "trt-export"
# Limitations to state in model cards.
ENGINE_LIMITS: Final = (
    "Engines run only on the compute capability in their name, with the version that built them; "
    "build others from model.onnx.",
    "Precisions are those that the builder lists; the export did not run any engine.",
)


# The compute capabilities that TensorRT for RTX compiles for, from its enumeration. Hopper is not among them.
CAPABILITIES: Final[Mapping[str, str]] = {
    "7.5": "SM75", "8.0": "SM80", "8.6": "SM86", "8.9": "SM89", "12.0": "SM120", "12.1": "SM121",
}  # fmt: skip


class Builder(StrEnum):
    """Which builder compiles the engines.

    TensorRT for RTX, on any machine; TensorRT (`enterprise`), for the GPU of this machine; or none: only the graph.
    """

    RTX = "rtx"
    ENTERPRISE = "enterprise"
    NONE = "none"


class Base(StrEnum):
    """The dtype of everything that is not quantized."""

    FP16 = "fp16"
    FP32 = "fp32"


def _known(value: tuple[str, ...]) -> tuple[str, ...]:
    unknown = [capability for capability in value if capability not in CAPABILITIES]
    if unknown or not value:
        raise ValueError(f"{', '.join(unknown) or 'none'}: choose from {', '.join(CAPABILITIES)}")
    return tuple(dict.fromkeys(value))


# Compute capabilities that the builder can compile for, at least one; without duplicates, in the given order.
Capabilities = Annotated[tuple[str, ...], AfterValidator(_known)]


class TrtFormat(StrEnum):
    """How weights and activations are stored and multiplied.

    `fp8`, `int8`: weights and activations as trained, including both matrix multiplications of every attention.
    `nvfp4`: linears in NVFP4; both ends of the model and every attention in FP8, as trained.
    `int8-weight-only`, `int4-weight-only`: weights as trained, in INT8 or in INT4 blocks; activations stay float.
    `nvfp4-weight-only`: weights as trained, in NVFP4, at both ends of the model in FP8; activations stay float.
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
        """The number type of the stored codes: INT, E4M3 or NVFP4."""
        if self is TrtFormat.FP8:
            return Kind.E4M3
        return Kind.NVFP4 if self in (TrtFormat.NVFP4, TrtFormat.NVFP4_WEIGHT_ONLY) else Kind.INT


_FP4_CAPABILITIES: Final = ("12.0", "12.1")
_FP4_DEFAULT: Final = ("12.0",)


def compile_for(format: TrtFormat, capabilities: tuple[str, ...], builder: Builder, *, given: bool) -> tuple[str, ...]:
    """The compute capabilities to compile for: `capabilities`, or the format's default unless they were `given`.

    Raises:
        ConfigurationError: a given compute capability does not support the format.
    """
    if format.kind is not Kind.NVFP4:
        return capabilities
    if not given:
        return _FP4_DEFAULT
    lacking = [capability for capability in capabilities if capability not in _FP4_CAPABILITIES]
    if builder is Builder.RTX and lacking:
        raise ConfigurationError(
            f"{format} cannot be compiled for compute capability {', '.join(lacking)}",
            why=f"four-bit floats need compute capability {' or '.join(_FP4_CAPABILITIES)}",
            fix="give --compute-capability 12.0, or --builder none for the graph alone",
        )
    return capabilities


class EnterpriseSettings(FrozenConfig):
    """Settings of TensorRT's builder (`enterprise`), which are part of an engine's recipe."""

    workspace_mib: Annotated[int, Flag("workspace")] = Field(
        default=4096, gt=0, description="Enterprise: scratch memory that kernels may use, MiB"
    )
    optimization_level: int = Field(
        default=3, ge=0, le=5, description="Enterprise: optimization level of the builder, 0 to 5"
    )
    version_compatible: Annotated[bool, Flag("version-compatible")] = Field(
        default=False, description="Enterprise: build engines that later versions can load"
    )

    @staticmethod
    def network_flags(version: str) -> tuple[str, ...]:
        """Names of NetworkDefinitionCreationFlag: 10.x needs one for strong typing, 11.x is always strongly typed."""
        return ("STRONGLY_TYPED",) if int(version.split(".")[0]) < 11 else ()

    def builder_flags(self) -> tuple[str, ...]:
        """Names of BuilderFlag, the same for 10.x and 11.x; strong typing allows no precision flags."""
        return ("VERSION_COMPATIBLE",) if self.version_compatible else ()


class TrtExportOptions(FrozenConfig):
    """Options of one export."""

    format: Annotated[TrtFormat | None, Flag(default="the artifact's own")] = Field(
        None, description="fp8, int8, nvfp4, int8-, int4- or nvfp4-weight-only"
    )
    builder: Builder = Field(
        Builder.RTX, description="rtx (compiles on any machine), enterprise (for this GPU) or none (only the graph)"
    )
    base: Base = Field(Base.FP16, description="Dtype of everything that is not quantized")
    compute_capabilities: Annotated[Capabilities, Flag("compute-capability", "8.9 12.0, for NVFP4 12.0")] = Field(
        ("8.9", "12.0"), description="A compute capability that rtx compiles for; repeatable"
    )
    batch: tuple[int, int, int] = Field((1, 8, 32), description="Smallest, typical and largest batch")
    require: bool = Field(True, description="Refuse engines that multiply in another precision")
    enterprise: EnterpriseSettings = Field(
        default_factory=EnterpriseSettings, description="Settings of the enterprise builder"
    )
    pack: bool = Field(True, description="Store engines compressed with xz, as `.engine.xz`")
    force: Annotated[bool, CONFIG_ONLY] = Field(False, description="Replace an existing output directory")

    @model_validator(mode="after")
    def _ordered(self) -> TrtExportOptions:
        low, usual, high = self.batch
        if not 1 <= low <= usual <= high:
            raise ValueError(f"batch {self.batch}: give three non-decreasing numbers, each at least 1")
        return self


class EngineSize(FrozenConfig):
    """Sizes of one engine in bytes."""

    engine_bytes: int = Field(gt=0, description="size of the file")
    text_bytes: int = Field(
        ge=0, description="text in it: source of kernels, and the builder's description of the network"
    )
    ideal_bytes: int = Field(gt=0, description="size of the graph's codes, scales and floats")

    @property
    def weights_over_ideal(self) -> float:
        """Size of the file without its text, relative to the ideal size."""
        return (self.engine_bytes - self.text_bytes) / self.ideal_bytes


class BuiltEngine(FrozenConfig):
    """An engine in an export, as listed in the manifest; `layers.json` lists each of its matrix multiplications."""

    engine: str = Field(description="path of its file")
    engine_bytes: int = Field(ge=0, description="size of the engine as built")
    precisions: dict[str, int] = Field(description="number of matrix multiplications by precision")
    fused_attentions: int = Field(default=0, ge=0, description="attentions that run as one kernel")
    stored_bytes: int | None = Field(default=None, ge=0, description="size of the engine as stored")
    size: EngineSize | None = Field(default=None, description="sizes of its parts")
    recipe: EngineRecipe | None = Field(
        default=None, description="what it was built from; none in exports from before recipes were recorded"
    )
    build_s: float | None = Field(default=None, description="wall time of the build")
    kernels: int | None = Field(default=None, description="number of kernels that multiply matrices")


class TrtDetails(GraphDetails):
    """The manifest's details for an export of a vision model to TensorRT."""

    base: str = Field(description="dtype of everything that is not quantized")
    trtexec: str = Field(default="", description="command that builds an engine on another machine")
    products: dict[str, str] = Field(
        default_factory=dict, description="required precision of each matrix multiplication"
    )
    engines: dict[str, BuiltEngine] = Field(default_factory=dict, description="engines by compute capability")


def migrate_trt(data: dict[str, Any]) -> dict[str, Any]:
    """Convert manifest data of an older version.

    Exports of language models, recognized by the key `cache`, used to have this kind, too, and the reason of a layer
    used to hold the base dtype.
    """
    from exporters.tensorrt.language.target import migrate_language

    if "cache" in data["details"]:
        return migrate_language(data)
    for layer in data["layers"]:
        layer["reason"] = ""
    return data


TARGET: Final = ExportTarget(
    name="trt", kind=KIND, takes=(VIT_KIND,), options=TrtExportOptions, details=TrtDetails,
    help="a Q/DQ graph and engines for TensorRT", export="exporters.tensorrt.export:export_tensorrt",
    plan="exporters.tensorrt.export:plan_tensorrt", verify="exporters.tensorrt.verify:check_trt",
    engines=(
        Engine("tensorrt", "validation.tensorrt.validate:validate_tensorrt", "validation.tensorrt.validate:describe",
               ("against", "device")),
    ),
    service=Service(
        "vision", serve="serving.vision.server:serve_vision", plan="validation.plan:plan_tensorrt",
        device="exporters.devices:in_tensorrt",
    ),
    after="exporters.tensorrt.export:after_export", migrate=migrate_trt,
)  # fmt: skip
