"""The target `trt --format modelopt-checkpoint`: safetensors in the layout of NVIDIA ModelOpt, for TensorRT-LLM."""

from __future__ import annotations

from typing import Final

from pydantic import Field

from exporters.modelopt.options import ModeloptExportOptions
from exporters.target import ExportTarget, Service
from exporters.tensorrt.language.target import SOURCES, CalibrationFacts, InputScale
from fp8pipe.artifact.kinds import Details

KIND: Final = "modelopt-export"


class ModeloptDetails(Details):
    """Of a checkpoint in ModelOpt's layout."""

    format: str = Field(description="as in --format")
    quant_algo: str = Field(description="FP8, or FP8_PER_CHANNEL_PER_TOKEN")
    calibration: CalibrationFacts | None = Field(
        default=None, description="the text behind the static scales, if there are any"
    )
    activation_scales: dict[str, InputScale] | None = Field(
        default=None, description="static scales of inputs, by layer"
    )


TARGET: Final = ExportTarget(
    name="trt", kind=KIND, takes=SOURCES, options=ModeloptExportOptions, details=ModeloptDetails,
    help="or a checkpoint in ModelOpt's layout", label="trt, modelopt-checkpoint",
    export="exporters.modelopt.checkpoint:export_checkpoint",
    plan="exporters.tensorrt.language.plan:plan_for_people", verify="exporters.modelopt.verify:check_modelopt",
    formats=("modelopt-checkpoint",),
    service=Service("language", refusal="no engine here reads this layout: TensorRT-LLM does"),
)  # fmt: skip
