"""Which GPUs a format can be compiled for: NVFP4 products are in Blackwell's tensor cores alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from exporters.tensorrt.formats import choose_format
from exporters.tensorrt.options import Builder, TrtExportOptions, TrtFormat
from fp8pipe.artifact import open_artifact
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.vision.quantized import load_quantized
from fp8pipe.numerics.kinds import Kind

__all__ = ["check_targets", "plan_targets", "with_targets"]

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
    format = choose_format(load_quantized(open_artifact(source, kind="vit").root), options.format, str(source))
    chosen = with_targets(options, format)
    return format, chosen.compute_capabilities if chosen.builder is not Builder.NONE else ()
