"""What became of each linear layer: the encoding of its weight and of its input, as fields that are never parsed."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field

from fp8pipe.core.config import FrozenConfig

__all__ = ["Encoding", "Granularity", "LayerRecord", "ScaleRule"]

Granularity = Literal["per-tensor", "per-channel", "per-token", "per-block"]


class ScaleRule(StrEnum):
    """Where a scale comes from."""

    AMAX = "amax"
    """The largest magnitude is mapped to the largest code."""
    POWER_OF_TWO = "power-of-two"
    """The same, rounded to a power of two."""
    PERCENTILE = "percentile"
    """A power of two that clips a few of the values seen in calibration."""
    MSE = "mse"
    """A power of two of the least mean squared error over the values seen in calibration."""
    CALIBRATED = "calibrated"
    """Chosen for the least error on calibration images."""
    LEARNED = "learned"
    """Calibrated, then trained with the weights."""


class Encoding(FrozenConfig):
    """How a tensor is quantized; `dequantized = code * scale`."""

    format: Literal["e4m3", "e5m2", "int", "nvfp4"] = Field(description="the grid of its codes")
    bits: int | None = Field(
        default=None, ge=2, le=8, description="width of a code; none where an older manifest did not record it"
    )
    granularity: Granularity = Field(description="what shares one scale")
    scale_rule: ScaleRule | None = Field(
        default=None, description="where the scale comes from; none where it is not recorded"
    )
    dynamic: bool = Field(
        default=False, description="computed from each input while the model runs (true), or stored (false)"
    )

    def __str__(self) -> str:
        rule = f", {self.scale_rule}" if self.scale_rule else ""
        width = "" if self.bits is None else f"{self.bits}-bit "
        return f"{width}{self.format}, {self.granularity}{rule}{', dynamic' if self.dynamic else ''}"


class LayerRecord(FrozenConfig):
    """One linear layer."""

    name: str = Field(description="the layer's name in the checkpoint, without '.weight'")
    shape: tuple[int, int] | None = Field(default=None, description="(out, in); none where it has no matrix")
    weight: Encoding | None = Field(default=None, description="how its weight is stored; none where it stays float")
    activation: Encoding | None = Field(
        default=None, description="how its input is quantized; none where it stays float"
    )
    reason: str = Field(default="", description="why it stays float, or what else is special about it")

    @property
    def converted(self) -> bool:
        """Whether the weight is stored as codes."""
        return self.weight is not None
