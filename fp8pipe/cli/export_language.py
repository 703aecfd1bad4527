"""`fp8pipe export --target trt` of a language model: which options apply, and the dry run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fp8pipe.cli.common import Console

if TYPE_CHECKING:
    from exporters.tensorrt.language.options import LanguageExportOptions
    from fp8pipe.artifact import Artifact

__all__ = ["export_language_model", "refuse_language_options"]

_VISION_ONLY: Final = ("pack", "enterprise")
_LANGUAGE_ONLY: Final = ("sequence", "cache", "calibration", "calibration_data", "calibration_records")
# A checkpoint is served by an engine that builds its own graphs.
_GRAPH_ONLY: Final = ("builder", "compute_capabilities", "base", "batch", "sequence", "cache", "require")
_FLAGS: Final = {
    "compute_capabilities": "--compute-capability", "cache": "--no-cache", "require": "--no-require",
    "enterprise": "--workspace and --version-compatible",
}  # fmt: skip


def refuse_language_options(chosen: dict[str, Any]) -> None:
    """Refuse options of language models for another artifact.

    Raises:
        ConfigurationError: naming them as they are written on the command line.
    """
    _refuse(chosen, _LANGUAGE_ONLY, "a vision model", "they are for language models, as `fp8pipe finetune` writes them")


def export_language_model(
    artifact: Path, output: Path, chosen: dict[str, Any], dry_run: bool, console: Console
) -> Artifact | None:
    """Export, or show what would be; None after a dry run.

    Raises:
        ConfigurationError: options that do not apply to the format.
    """
    from exporters.tensorrt.language.export import export_language
    from exporters.tensorrt.language.options import LanguageExportOptions, LanguageFormat
    from fp8pipe.core.config import build_config

    _refuse(chosen, _VISION_ONLY, "a language model", "they are for vision models")
    options = build_config(LanguageExportOptions, chosen)
    if options.format is LanguageFormat.MODELOPT:
        _refuse(chosen, _GRAPH_ONLY, f"--format {options.format}", "they are for graphs and engines")
    if not dry_run:
        return export_language(artifact, output, options)
    document, text = _plan(artifact, output, options)
    console.emit({"dry_run": True, "target": "trt", **document}, text, quiet_text=str(output))
    return None


def _refuse(chosen: dict[str, Any], keys: tuple[str, ...], what: str, why: str) -> None:
    from fp8pipe.core.errors import ConfigurationError

    foreign = [_FLAGS.get(key, f"--{key.replace('_', '-')}") for key in keys if key in chosen]
    if foreign:
        raise ConfigurationError(f"{' and '.join(foreign)} cannot be given for {what}", why=why, fix="leave it out")


def _plan(source: Path, output: Path, options: LanguageExportOptions) -> tuple[dict[str, Any], str]:
    """The dry run: headers and manifests are read; nothing is linted, calibrated or traced."""
    from exporters.tensorrt.language.options import LanguageFormat
    from exporters.tensorrt.language.plan import plan_language
    from fp8pipe.core.disk import free_bytes
    from fp8pipe.core.machine import resident_bytes
    from fp8pipe.core.plan import Missing, Plan, missing_disk, missing_memory, missing_packages

    plan, free = plan_language(source, options), free_bytes(output)
    document = {
        "source": str(source),
        "output": str(output),
        "output_exists": output.exists(),
        "format": str(options.format),
        "calibration_data": plan.text,
        "need_bytes": plan.need_bytes,
        "free_bytes": free,
        "fits": free >= plan.need_bytes,
        "layer_counts": {"quantized": plan.layers, "float": plan.others},
        "engines": list(plan.engines),
    }
    graph = options.format is LanguageFormat.FP8
    peak = resident_bytes() + plan.working_bytes
    packages = (
        *(("onnx", "onnx-ir", "onnxscript", "onnxruntime") if graph else ()),
        *(("tensorrt-rtx",) if plan.engines else ()),
    )
    written = plan.disk_bytes
    no_text = Missing("no text is named to calibrate on", "give --calibration-data")
    shown = Plan(
        reads=(str(source), *((plan.text,) if plan.text else ())),
        writes=(f"{output}{' (exists; needs --force)' if output.exists() and not options.force else ''}",),
        peak_memory_bytes=peak,
        disk_bytes=written,
        output_bytes=written,
        packages=packages,
        missing=(*(() if plan.text else (no_text,)), *missing_packages(packages), *missing_disk(output, written),
                 *missing_memory(peak, "a machine with more memory, or a smaller model")),
        notes=(
            f"memory is reckoned: {plan.reckoned}",
            *(("engines are compiled by a process of its own, whose memory is not predicted",) if plan.engines else ()),
        ),
        facts={
            "format": str(options.format),
            "layers": f"{plan.layers} in FP8, {plan.others} float",
            "calibration": f"{plan.text or 'no text is named: give --calibration-data'} ({options.calibration})",
            "engines": ", ".join(plan.engines) or "none",
        },
    )  # fmt: skip
    return {**document, "plan": shown.document()}, shown.text()
