"""Which number formats an artifact can be exported in, and the model that each of them computes."""

from __future__ import annotations

from typing import Final

from exporters.graph.formats import OnnxFormat
from exporters.graph.lint import refuse
from exporters.graph.passes.weights import fits_int4
from exporters.graph.produce import as_exported
from exporters.tensorrt.options import TrtFormat
from fp8pipe.artifact.finding import Finding
from fp8pipe.models.vision.quantized import QuantizedVit
from fp8pipe.numerics.kinds import Kind

__all__ = ["choose_format", "in_format"]

# For messages: what codes of a family are called, the artifact's own format, and the precision that makes them.
_OWN: Final = {
    Kind.INT: ("integers", TrtFormat.INT8, "integer bits, for instance w8a8"),
    Kind.E4M3: ("FP8", TrtFormat.FP8, "wfp8afp8"),
    Kind.NVFP4: ("NVFP4", TrtFormat.NVFP4, "wnvfp4anvfp4"),
}


def choose_format(quantized: QuantizedVit, wanted: TrtFormat | None, source: str) -> TrtFormat:
    """The wanted format, or the artifact's own.

    Raises:
        LintFindingsError: the artifact's codes cannot be stored in it without being rounded again.
    """
    kinds = {weight.kind for weight in quantized.weights.values()}
    # NVFP4 has FP8 beside it; no other family has any.
    kind = next((kind for kind in (Kind.NVFP4, Kind.E4M3) if kind in kinds), Kind.INT)
    called, own, _ = _OWN[kind]
    format = own if wanted is None else wanted
    findings = []
    if kind is not format.kind:
        bits = _OWN[format.kind][2]
        why = f"the artifact's codes are {called}; {format} would round them again"
        findings.append(Finding("format", "weights", why, f"export as {own}, or quantize with --bits {bits}"))
    elif format is TrtFormat.INT4_WEIGHT_ONLY and not any(map(fits_int4, quantized.weights.values())):
        findings.append(Finding("int4-width", "weights", "none has codes of 4 bits", "export as int8-weight-only"))
    refuse(findings, source)
    return format


def in_format(quantized: QuantizedVit, format: TrtFormat) -> QuantizedVit:
    """The model that an export computes: without activation quantizers for weights alone."""
    return as_exported(quantized, OnnxFormat.INT4_WEIGHT_ONLY) if format.weight_only else quantized
