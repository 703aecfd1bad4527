"""The target `trt` for language models: the decoder as an FP8 graph with static scales, and engines for TensorRT."""

from __future__ import annotations

from typing import Any, Final

from pydantic import Field

from exporters.graph.details import GraphOutput
from exporters.target import Engine, ExportTarget, Service
from exporters.tensorrt.language.options import LanguageExportOptions
from exporters.tensorrt.target import BuiltEngine
from fp8pipe.artifact.kinds import FALQON_KIND, Details
from fp8pipe.artifact.manifest import Encoding
from fp8pipe.core.config import FrozenConfig

__all__ = [
    "KIND",
    "TARGET",
    "CacheFacts",
    "CalibrationFacts",
    "InputScale",
    "PerplexityFacts",
    "TrtLanguageDetails",
    "migrate_language",
]

KIND: Final = "trt-language-export"
# What is exported here: codes that were trained.
SOURCES: Final = (FALQON_KIND,)


class CalibrationFacts(FrozenConfig):
    """The text behind static scales."""

    data: str = Field(description="the source, as it was named")
    sha256: str | None = Field(default=None, description="of the records that were taken")
    records: int = Field(ge=0, description="how many were taken")


class InputScale(FrozenConfig):
    """One static scale, as it is recorded in an export."""

    scale: float = Field(gt=0, description="value = code * scale; a power of two")
    amax: float = Field(description="largest magnitude seen")
    clipped: float = Field(description="share of the values seen that are beyond the range")
    values: int = Field(description="values seen")


class CacheFacts(FrozenConfig):
    """Shape of the key/value cache."""

    layers: int = Field(description="layers that have one")
    heads: int = Field(description="key/value heads")
    size: int = Field(description="of a head")


class PerplexityFacts(FrozenConfig):
    """Perplexity on held-out text."""

    own: float = Field(description="of the artifact, activations as trained")
    served: float = Field(description="of the exported graph")
    error: float = Field(description="standard error of the difference, nats per token")
    tokens: int = Field(description="answer tokens")


class TrtLanguageDetails(Details):
    """Of an export of a language model to TensorRT."""

    format: str = Field(description="as in --format")
    base: str = Field(description="type of what is not quantized")
    output: GraphOutput = Field(description="logits")
    trtexec: str = Field(default="", description="the command that builds an engine elsewhere")
    cache: CacheFacts | None = Field(default=None, description="none for a graph without key/value cache")
    activations: Encoding = Field(description="how the graph quantizes inputs")
    trained_activations: Encoding | None = Field(default=None, description="how training quantized them")
    calibration: CalibrationFacts = Field(description="the text behind the static scales")
    passes: dict[str, int] = Field(default_factory=dict, description="places that each pass changed")
    engines: dict[str, BuiltEngine] = Field(default_factory=dict, description="by compute capability")
    perplexity: PerplexityFacts | None = Field(default=None, description="on held-out text")


def migrate_language(data: dict[str, Any]) -> dict[str, Any]:
    """Of the kind `trt-export` until schema 2; its sentence on training said one power of two for every rule."""
    rule = str(data.get("config", {}).get("calibration", "amax"))
    scale = {"format": "e4m3", "bits": 8, "granularity": "per-tensor"}
    details = {**data["details"], "activations": scale | {"scale_rule": rule if rule != "amax" else "power-of-two"}}
    return data | {"kind": KIND, "details": details}


TARGET: Final = ExportTarget(
    name="trt", kind=KIND, takes=SOURCES, options=LanguageExportOptions, details=TrtLanguageDetails,
    help="of language models, a decoder graph and engines", label="trt, language",
    export="exporters.tensorrt.language.export:export_language",
    plan="exporters.tensorrt.language.plan:plan_for_people",
    verify="exporters.tensorrt.language.verify:check_language",
    engines=(
        Engine("tensorrt", "validation.tensorrt.language:validate_language", "validation.tensorrt.validate:describe"),
    ),
    service=Service(
        "language", refusal="engines of language models are not run here", plan="validation.plan:plan_tensorrt",
    ),
)  # fmt: skip
