"""Which number formats an artifact can be exported in, and the model that each of them computes."""

from __future__ import annotations

from enum import StrEnum

from exporters.findings import Finding
from exporters.onnx.lint import refuse
from exporters.onnx.options import OnnxFormat
from exporters.onnx.passes.weights import fits_int4
from exporters.onnx.produce import as_exported
from fp8pipe.vision.quantized import QuantizedVit
from fp8pipe.vision.quantizers import Kind

__all__ = ["TrtFormat", "choose_format", "in_format"]


class TrtFormat(StrEnum):
    """How products are stored and multiplied.

    `fp8`, `int8`: weights and activations as trained, both products of every attention too.
    `int8-weight-only`, `int4-weight-only`: weights as trained, in INT8 or in INT4 blocks; activations stay float.
    """

    FP8 = "fp8"
    INT8 = "int8"
    INT8_WEIGHT_ONLY = "int8-weight-only"
    INT4_WEIGHT_ONLY = "int4-weight-only"

    @property
    def weight_only(self) -> bool:
        """Whether activations stay float."""
        return self in (TrtFormat.INT8_WEIGHT_ONLY, TrtFormat.INT4_WEIGHT_ONLY)


def choose_format(quantized: QuantizedVit, asked: TrtFormat | None, source: str) -> TrtFormat:
    """The format asked for, or the artifact's own.

    Raises:
        LintFindingsError: the artifact's codes cannot be stored in it without being rounded again.
    """
    fp8 = any(weight.kind is Kind.E4M3 for weight in quantized.weights.values())
    own = TrtFormat.FP8 if fp8 else TrtFormat.INT8
    format = own if asked is None else asked
    findings = []
    if fp8 != (format is TrtFormat.FP8):
        bits = "wfp8afp8" if format is TrtFormat.FP8 else "integer bits, for instance w8a8"
        why = f"the artifact's codes are {'FP8' if fp8 else 'integers'}; {format} would round them again"
        findings.append(Finding("format", "weights", why, f"export as {own}, or quantize with --bits {bits}"))
    elif format is TrtFormat.INT4_WEIGHT_ONLY and not any(map(fits_int4, quantized.weights.values())):
        findings.append(Finding("int4-width", "weights", "none has codes of 4 bits", "export as int8-weight-only"))
    refuse(findings, source)
    return format


def in_format(quantized: QuantizedVit, format: TrtFormat) -> QuantizedVit:
    """The model that an export computes: without activation quantizers for weights alone."""
    return as_exported(quantized, OnnxFormat.INT4_WEIGHT_ONLY) if format.weight_only else quantized
