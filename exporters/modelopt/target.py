"""The target `trt --format modelopt-checkpoint`: safetensors in the layout of NVIDIA ModelOpt, for TensorRT-LLM."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field

from exporters.target import ExportTarget, Service
from exporters.tensorrt.language.target import SOURCES, CalibrationFacts, CalibrationOptions, InputScale
from exporters.vllm.target import KvScale
from fp8pipe.artifact.kinds import Details
from fp8pipe.core.config import CONFIG_ONLY, Flag

KIND: Final = "modelopt-export"


class ModeloptExportOptions(CalibrationOptions):
    """Options of one checkpoint, for engines that build their own graphs."""

    format: Literal["modelopt-checkpoint"] = Field(
        default="modelopt-checkpoint", description="A checkpoint in ModelOpt's layout"
    )
    kv_cache: Annotated[Literal["fp8"] | None, Flag(default="the compute dtype")] = Field(
        default=None, description="How engines store keys and values; fp8: E4M3 with calibrated scales"
    )
    force: Annotated[bool, CONFIG_ONLY] = Field(default=False, description="Replace an existing output directory")


class ModeloptDetails(Details):
    """The manifest's details for a checkpoint in ModelOpt's layout."""

    format: str = Field(description="export format, as given to --format")
    quant_algo: str = Field(description="FP8, or FP8_PER_CHANNEL_PER_TOKEN")
    calibration: CalibrationFacts | None = Field(
        default=None, description="the text that static scales were calibrated on, if there are any"
    )
    activation_scales: dict[str, InputScale] | None = Field(
        default=None, description="static scales of inputs, by layer"
    )
    kv_cache: dict[str, KvScale] | None = Field(
        default=None, description="scales of an FP8 key/value cache, by attention layer; none where it is not in FP8"
    )


TARGET: Final = ExportTarget(
    name="trt", kind=KIND, takes=SOURCES, options=ModeloptExportOptions, details=ModeloptDetails,
    help="or a checkpoint in ModelOpt's layout", label="trt (modelopt-checkpoint)",
    export="exporters.modelopt.checkpoint:export_checkpoint",
    plan="exporters.tensorrt.language.plan:plan_for_people", verify="exporters.modelopt.verify:check_modelopt",
    foresee="exporters.tensorrt.language.source:foresee_checkpoint",
    formats=("modelopt-checkpoint",),
    service=Service("language", refusal="fp8pipe runs no engine that reads this layout; TensorRT-LLM does"),
)  # fmt: skip
