"""The export target `trt` for language models: a decoder graph in FP8 or with weights in NVFP4, and its engines.

This module defines the options of the export, its details in the manifest, and the registration of the target.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Final, Literal

from pydantic import Field, field_validator, model_validator

from exporters.graph.formats import GraphOutput
from exporters.target import Engine, ExportTarget, Service
from exporters.tensorrt.target import Base, Builder, BuiltEngine, Capabilities, TrtFormat, compile_for
from fp8pipe.artifact.kinds import FALQON_KIND, Details
from fp8pipe.artifact.manifest import Encoding
from fp8pipe.core.config import CONFIG_ONLY, Flag, FrozenConfig
from fp8pipe.numerics.kinds import Kind

KIND: Final = "trt-language-export"
# Kinds of artifacts that can be exported: only those with trained codes.
SOURCES: Final = (FALQON_KIND,)
# A graph of at most so many bytes is also run as a whole, to compare it with its layers.
WHOLE_BYTES: Final = 256 << 20


class Calibration(StrEnum):
    """How a static activation scale is computed from calibration text.

    `amax` clips no value of the text; `percentile` may clip one value in a hundred thousand; `mse` is the scale with
    the smallest mean squared rounding error.
    """

    AMAX = "amax"
    PERCENTILE = "percentile"
    MSE = "mse"


class CalibrationOptions(FrozenConfig):
    """Options of the calibration of static activation scales."""

    calibration: Calibration = Field(Calibration.AMAX, description="Rule for static activation scales")
    calibration_data: Annotated[str | None, Flag(default="the training data")] = Field(
        None, description="Text to calibrate on"
    )
    calibration_records: int = Field(128, ge=1, description="Records to calibrate on")


class LanguageExportOptions(CalibrationOptions):
    """Options of the export of a language model as a graph with engines."""

    format: Annotated[Literal["fp8", "nvfp4-weight-only"] | None, Flag(default="the artifact's own")] = Field(
        None, description="fp8 or nvfp4-weight-only: graph and engines"
    )
    builder: Builder = Field(Builder.RTX, description="rtx (compiles on any machine) or none (only the graph)")
    base: Base = Field(Base.FP16, description="Dtype of everything that is not quantized")
    compute_capabilities: Annotated[Capabilities, Flag("compute-capability", "8.9 12.0, for NVFP4 12.0")] = Field(
        ("8.9", "12.0"), description="A compute capability to compile for; repeatable"
    )
    batch: tuple[int, int, int] = Field((1, 1, 8), description="Smallest, typical and largest batch, sequences")
    sequence: tuple[int, int, int] = Field(
        (1, 128, 1024), description="Smallest, typical and largest number of new tokens, and of cached ones"
    )
    cache: bool = Field(True, description="Key/value cache as inputs and outputs of the graph")
    require: bool = Field(True, description="Refuse engines that multiply in another precision, and a worse perplexity")
    force: Annotated[bool, CONFIG_ONLY] = Field(False, description="Replace an existing output directory")

    def capabilities(self, format: TrtFormat) -> tuple[str, ...]:
        """The compute capabilities to compile for, for a format; see `compile_for`."""
        return compile_for(
            format, self.compute_capabilities, self.builder, given="compute_capabilities" in self.model_fields_set
        )

    @field_validator("builder")
    @classmethod
    def _compiles(cls, value: Builder) -> Builder:
        if value is Builder.ENTERPRISE:
            raise ValueError(
                "language models are built with rtx only; for TensorRT, use the trtexec command in the manifest"
            )
        return value

    @model_validator(mode="after")
    def _ordered(self) -> LanguageExportOptions:
        for name, (low, usual, high) in (("batch", self.batch), ("sequence", self.sequence)):
            if not 1 <= low <= usual <= high:
                numbers = f"{low} {usual} {high}"
                raise ValueError(f"{name} {numbers}: give three non-decreasing numbers, each at least 1")
        return self


class CalibrationFacts(FrozenConfig):
    """Description of the text on which static scales were calibrated."""

    data: str = Field(description="path or name of the text, as given")
    sha256: str | None = Field(default=None, description="digest of the calibration records")
    records: int = Field(ge=0, description="number of records used")


class InputScale(FrozenConfig):
    """The static activation scale of one layer, as recorded in an export."""

    scale: float = Field(gt=0, description="value = code * scale; a power of two")
    amax: float = Field(description="largest absolute value in calibration")
    clipped: float = Field(description="share of these values beyond the range of the codes")
    values: int = Field(description="number of values in calibration")


class CacheFacts(FrozenConfig):
    """Shape of a graph's key/value cache."""

    layers: int = Field(description="number of layers with a cache")
    heads: int = Field(description="number of key/value heads")
    size: int = Field(description="dimension of a head")


class PerplexityFacts(FrozenConfig):
    """Perplexity on held-out text of the artifact and of its export."""

    own: float = Field(description="perplexity of the artifact, with activations quantized as in training")
    served: float = Field(description="perplexity of the exported graph")
    error: float = Field(description="standard error of the difference, nats per token")
    tokens: int = Field(description="number of answer tokens")


class TrtLanguageDetails(Details):
    """The manifest's details for an export of a language model to TensorRT."""

    format: str = Field(description="export format, as given to --format")
    base: str = Field(description="dtype of everything that is not quantized")
    output: GraphOutput = Field(description="logits")
    trtexec: str = Field(default="", description="command that builds an engine on another machine")
    cache: CacheFacts | None = Field(default=None, description="none for a graph without key/value cache")
    activations: Encoding | None = Field(default=None, description="how the graph quantizes inputs; none for NVFP4")
    trained_activations: Encoding | None = Field(default=None, description="how training quantized them")
    calibration: CalibrationFacts = Field(description="the text that static scales were calibrated on")
    passes: dict[str, int] = Field(default_factory=dict, description="number of places that each pass changed")
    engines: dict[str, BuiltEngine] = Field(default_factory=dict, description="engines by compute capability")
    perplexity: PerplexityFacts | None = Field(default=None, description="perplexity on held-out text")
    traced: str = Field(
        default="whole", description="`layers` for a graph made from traces of single layers, which runs layer by layer"
    )


def product_precision(format: TrtFormat, base: Base) -> str:
    """The precision in which linear layers have to be multiplied, as the builder's listing names it."""
    return base.value if format.weight_only else "fp8"


def migrate_language(data: dict[str, Any]) -> dict[str, Any]:
    """Convert the manifest of an export from before schema 3.

    Until schema 2, these exports had the kind `trt-export`, and their description of activations stated power-of-two
    scales for any method of calibration.
    """
    rule = str(data.get("config", {}).get("calibration", "amax"))
    scale = {"format": Kind.E4M3.value, "bits": 8, "granularity": "per-tensor"}
    details = {**data["details"], "activations": scale | {"scale_rule": rule if rule != "amax" else "power-of-two"}}
    return data | {"kind": KIND, "details": details}


TARGET: Final = ExportTarget(
    name="trt", kind=KIND, takes=SOURCES, options=LanguageExportOptions, details=TrtLanguageDetails,
    help="of language models, a decoder graph and engines", label="trt (language)",
    export="exporters.tensorrt.language.export:export_language",
    plan="exporters.tensorrt.language.plan:plan_for_people",
    verify="exporters.tensorrt.verify:check_language", foresee="exporters.tensorrt.language.source:foresee_graph",
    engines=(
        Engine("tensorrt", "validation.tensorrt.language:validate_language", "validation.tensorrt.validate:describe"),
    ),
    service=Service(
        "language", refusal="fp8pipe does not run engines of language models", plan="validation.plan:plan_tensorrt",
        device="exporters.devices:in_tensorrt_language",
    ),
)  # fmt: skip
