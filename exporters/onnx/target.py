"""The target `onnx`: a Q/DQ graph for ONNX Runtime, with its options and manifest details."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field

from exporters.graph.formats import GraphDetails, OnnxFormat
from exporters.target import Engine, ExportTarget, Service
from fp8pipe.artifact.kinds import VIT_KIND
from fp8pipe.core.config import CONFIG_ONLY, FrozenConfig

KIND: Final = "onnx-export"


class OnnxExportOptions(FrozenConfig):
    """Options of one export."""

    format: OnnxFormat = Field(
        default=OnnxFormat.QDQ,
        description="qdq (weights and activations as trained), qdq-exact (with operators whose result is exact) or "
        "int4-weight-only (float activations)",
    )
    force: Annotated[bool, CONFIG_ONLY] = Field(default=False, description="Replace an existing output directory")


class OnnxDetails(GraphDetails):
    """The manifest's details for an export to ONNX."""

    near_tie: float = Field(
        default=0.0,
        description="margin between two classes, in logits; recorded by earlier versions, no longer used",
    )


TARGET: Final = ExportTarget(
    name="onnx", kind=KIND, takes=(VIT_KIND,), options=OnnxExportOptions, details=OnnxDetails,
    help="a Q/DQ graph for ONNX Runtime", export="exporters.onnx.export:export_onnx",
    plan="exporters.onnx.export:plan_onnx", verify="exporters.onnx.verify:check_onnx",
    engines=(
        Engine(
            "onnxruntime", "validation.onnx.validate:validate_onnx", "validation.onnx.validate:describe",
            ("against", "images"),
        ),
    ),
    service=Service(
        "vision", serve="serving.vision.server:serve_vision", plan="validation.plan:plan_onnx",
        bench="validation.bench.speed:bench_vision", ask="validation.bench.check:ask_vision",
        repository="exporters.triton.repository:write_vision", device="exporters.devices:in_onnxruntime",
    ),
)  # fmt: skip
