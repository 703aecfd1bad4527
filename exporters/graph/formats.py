"""What a Q/DQ graph may hold."""

from __future__ import annotations

from enum import StrEnum

__all__ = ["OnnxFormat"]


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
