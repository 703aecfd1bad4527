"""The quantized format of a base model, as recorded in the manifests of artifacts that were made from it.

A base model in FP8 or MXFP4 is dequantized when it is read, and artifacts made from it do not contain its codes. Their
weights still have its rounding errors: they derive from the quantized model, not from the original one. A field of the
manifest states this.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fp8pipe.core.config import FrozenConfig

__all__ = ["StoredFormat"]


class StoredFormat(FrozenConfig):
    """The format of a base model in low precision, whose weights were dequantized as code * scale."""

    method: Literal["compressed-tensors", "fp8", "modelopt", "mxfp4"] = Field(
        description="the format, as config.json names it"
    )
    codes: Literal["e4m3", "e2m1"] = Field(default="e4m3", description="the grid of its codes")
    granularity: list[Literal["per-tensor", "per-channel", "per-block"]] = Field(description="what shares one scale")
    block: tuple[int, int] | None = Field(default=None, description="rows and columns of a block, where there are some")
    weights: int = Field(ge=1, description="how many of its tensors were dequantized")
    dtype: str = Field(description="what code * scale was rounded to, once, from fp32; as safetensors spells it")

    def __str__(self) -> str:
        blocks = f" of {self.block[0]}x{self.block[1]}" if self.block else ""
        how = f"{self.method}, {' and '.join(self.granularity)}{blocks}"
        kind = "FP8" if self.codes == "e4m3" else "FP4"
        return f"{kind} ({how}), {self.weights} weight(s) dequantized to {self.dtype}"
