"""What an ONNX export may be asked for: one frozen model, written whole into the export's manifest."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from fp8pipe.config import FrozenConfig

__all__ = ["OnnxExportOptions", "OnnxFormat"]


class OnnxFormat(StrEnum):
    """How quantized parts are stored and run.

    `qdq`: codes of weights (INT8 or FP8 E4M3) and quantizers of activations, as trained.
    `qdq-exact`: the same with float64 between the products, so that results have one value, bit for bit; slower.
    `int4-weight-only`: weights of at most 4 bits in INT4, half the bytes; activations stay float.
    """

    QDQ = "qdq"
    QDQ_EXACT = "qdq-exact"
    INT4_WEIGHT_ONLY = "int4-weight-only"

    @property
    def quantizes_activations(self) -> bool:
        """Whether activations are rounded to their grids."""
        return self is not OnnxFormat.INT4_WEIGHT_ONLY


class OnnxExportOptions(FrozenConfig):
    """Options of one export."""

    format: OnnxFormat = Field(
        default=OnnxFormat.QDQ,
        description="qdq (weights and activations as trained), qdq-exact (in arithmetic that has one result) or "
        "int4-weight-only (float activations)",
    )
    force: bool = Field(default=False, description="replace an existing output directory (true or false)")
