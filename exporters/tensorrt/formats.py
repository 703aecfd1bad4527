"""Which formats an artifact can be exported in, the model that each computes, and the GPUs that have it.

NVFP4 products are in Blackwell's tensor cores alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from exporters.graph.formats import OnnxFormat
from exporters.graph.lint import refuse
from exporters.graph.passes.weights import fits_int4
from exporters.graph.produce import as_exported
from exporters.tensorrt.options import Builder, TrtExportOptions, TrtFormat
from fp8pipe.artifact import open_artifact
from fp8pipe.artifact.finding import Finding
from fp8pipe.artifact.kinds import VIT_KIND
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.vision.quantized import QuantizedVit, load_quantized
from fp8pipe.numerics.kinds import Kind

__all__ = ["check_targets", "choose_format", "in_format", "plan_targets", "with_targets"]

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


_FP4_CAPABILITIES: Final = ("12.0", "12.1")
_FP4_DEFAULT: Final = ("12.0",)


def with_targets(options: TrtExportOptions, format: TrtFormat) -> TrtExportOptions:
    """The options with the format's own compute capabilities where none were given.

    Raises:
        ConfigurationError: those that were given do not have the format.
    """
    if format.kind is Kind.NVFP4 and "compute_capabilities" not in options.model_fields_set:
        return options.model_copy(update={"compute_capabilities": _FP4_DEFAULT})
    if options.builder is Builder.RTX:
        check_targets(format, options.compute_capabilities)
    return options


def check_targets(format: TrtFormat, capabilities: Sequence[str]) -> None:
    """Refuse compute capabilities without the format's number types, before the builder does.

    Raises:
        ConfigurationError: naming them and those that have it.
    """
    lacking = [capability for capability in capabilities if capability not in _FP4_CAPABILITIES]
    if format.kind is Kind.NVFP4 and lacking:
        raise ConfigurationError(
            f"{format} cannot be compiled for compute capability {', '.join(lacking)}",
            why=f"four-bit floats need {' or '.join(_FP4_CAPABILITIES)}",
            fix="give --compute-capability 12.0, or --builder none for the graph alone",
        )


def plan_targets(source: Path, options: TrtExportOptions) -> tuple[TrtFormat, tuple[str, ...]]:
    """The format of an export and the compute capabilities of its engines. Writes nothing.

    Raises:
        BadArtifactError: no such artifact, or a damaged one.
        LintFindingsError: the artifact's codes cannot be stored in the format.
        ConfigurationError: a compute capability does not have it.
    """
    format = choose_format(load_quantized(open_artifact(source, kind=VIT_KIND).root), options.format, str(source))
    chosen = with_targets(options, format)
    return format, chosen.compute_capabilities if chosen.builder is not Builder.NONE else ()
