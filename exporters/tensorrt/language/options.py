"""What the export of a language model may be asked for: one frozen model, written whole into the export's manifest."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from exporters.tensorrt.options import Base, Builder, known_capabilities
from fp8pipe.core.config import CONFIG_ONLY, Flag, FrozenConfig

__all__ = ["Calibration", "CalibrationOptions", "LanguageExportOptions"]


class Calibration(StrEnum):
    """How a static activation scale follows from what was seen on text.

    `amax`: nothing that was seen is clipped. `percentile`: one value in a hundred thousand may be. `mse`: the least
    mean squared error.
    """

    AMAX = "amax"
    PERCENTILE = "percentile"
    MSE = "mse"


class CalibrationOptions(FrozenConfig):
    """How static scales of inputs are had."""

    calibration: Calibration = Field(Calibration.AMAX, description="How static activation scales follow from the text")
    calibration_data: Annotated[str | None, Flag(default="the training's")] = Field(
        None, description="Text to calibrate on"
    )
    calibration_records: int = Field(128, ge=1, description="Records to calibrate on")


class LanguageExportOptions(CalibrationOptions):
    """Options of one export of a language model as a graph with engines."""

    format: Literal["fp8"] = Field("fp8", description="Graph and engines")
    builder: Builder = Field(Builder.RTX, description="rtx, which compiles on any machine, or none, the graph alone")
    base: Base = Field(Base.FP16, description="Type of what is not quantized")
    compute_capabilities: Annotated[tuple[str, ...], Flag("compute-capability")] = Field(
        ("8.9", "12.0"), description="A GPU to compile for; repeatable"
    )
    batch: tuple[int, int, int] = Field((1, 1, 8), description="Smallest, usual and largest batch, sequences")
    sequence: tuple[int, int, int] = Field(
        (1, 128, 1024), description="Smallest, usual and largest number of new tokens; also of cached ones"
    )
    cache: bool = Field(True, description="Key/value cache as inputs and outputs of the graph")
    require: bool = Field(
        True, description="Refuse engines with a product in another precision, and a worse perplexity"
    )
    force: Annotated[bool, CONFIG_ONLY] = Field(False, description="Replace an existing output directory")

    @field_validator("builder")
    @classmethod
    def _compiles(cls, value: Builder) -> Builder:
        if value is Builder.ENTERPRISE:
            raise ValueError("language models are built by rtx here; for TensorRT use the trtexec line of the manifest")
        return value

    @field_validator("compute_capabilities")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return known_capabilities(value)

    @model_validator(mode="after")
    def _ordered(self) -> LanguageExportOptions:
        for name, (low, usual, high) in (("batch", self.batch), ("sequence", self.sequence)):
            if not 1 <= low <= usual <= high:
                numbers = f"{low} {usual} {high}"
                raise ValueError(f"{name} {numbers}: three numbers from 1, none smaller than the one before")
        return self
