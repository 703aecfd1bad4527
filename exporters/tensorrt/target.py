"""The target `trt` for vision models: a strongly typed Q/DQ graph, and engines of TensorRT."""

from __future__ import annotations

from typing import Any, Final

from pydantic import Field

from exporters.graph.details import GraphDetails
from exporters.target import Engine, ExportTarget, Service
from exporters.tensorrt.options import TrtExportOptions
from exporters.tensorrt.recipe import EngineRecipe
from fp8pipe.artifact.kinds import VIT_KIND
from fp8pipe.core.config import FrozenConfig

__all__ = ["KIND", "TARGET", "BuiltEngine", "EngineSize", "TrtDetails", "migrate_trt"]

KIND: Final = "trt-export"
# For model cards.
ENGINE_LIMITS: Final = (
    "Engines fit the compute capability in their name and the version that built them; model.onnx makes others.",
    "Precisions are those that the builder lists; no engine was executed when this was written.",
)


class EngineSize(FrozenConfig):
    """Bytes of one engine."""

    engine_bytes: int = Field(gt=0, description="the file")
    text_bytes: int = Field(ge=0, description="source text of kernels, and the builder's description of the network")
    ideal_bytes: int = Field(gt=0, description="the graph's codes, scales and floats")

    @property
    def weights_over_ideal(self) -> float:
        """The file without its text, over the ideal."""
        return (self.engine_bytes - self.text_bytes) / self.ideal_bytes


class BuiltEngine(FrozenConfig):
    """An engine in an export, as the manifest lists it; `layers.json` has every product of it."""

    engine: str = Field(description="its file")
    engine_bytes: int = Field(ge=0, description="as built")
    precisions: dict[str, int] = Field(description="products by the precision they are multiplied in")
    fused_attentions: int = Field(default=0, ge=0, description="attentions that run as one kernel")
    stored_bytes: int | None = Field(default=None, ge=0, description="as stored")
    size: EngineSize | None = Field(default=None, description="what it weighs")
    recipe: EngineRecipe | None = Field(
        default=None, description="what it was built from; none before recipes were kept"
    )
    build_s: float | None = Field(default=None, description="wall time of the build")
    kernels: int | None = Field(default=None, description="kernels that multiply")


class TrtDetails(GraphDetails):
    """Of an export of a vision model to TensorRT."""

    base: str = Field(description="type of what is not quantized")
    trtexec: str = Field(default="", description="the command that builds an engine elsewhere")
    products: dict[str, str] = Field(default_factory=dict, description="precision that each product must have")
    engines: dict[str, BuiltEngine] = Field(default_factory=dict, description="by compute capability")


def migrate_trt(data: dict[str, Any]) -> dict[str, Any]:
    """Exports of language models were of this kind, too, and told by their cache; reasons held the base type."""
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
               ("against",)),
    ),
    service=Service(
        "vision", serve="serving.vision.server:serve_vision", plan="validation.plan:plan_tensorrt",
    ),
    after="exporters.tensorrt.export:after_export", migrate=migrate_trt,
)  # fmt: skip
