"""`fp8pipe quantize-vit`: quantize a vision transformer, by default without any data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fp8pipe.cli.common import Console, common_options, show_artifact, show_plan, stage_options
from fp8pipe.cli.options import model_options, resolve
from fp8pipe.core.machine import wait_briefly
from pipeline.vit.config import QuantizeVitConfig

if TYPE_CHECKING:
    from fp8pipe.artifact import Artifact
    from fp8pipe.artifact.kinds import VitDetails


@click.command(name="quantize-vit")
@model_options(QuantizeVitConfig)
@stage_options("output", "config", "force", "resume")
@common_options(dry_run=True)
def command(
    *, output: Path, config: Path | None, force: bool, resume: bool, dry_run: bool, console: Console, **options: Any
) -> None:
    """Quantize a vision transformer to low-bit integers or FP8.

    By default no data is needed: calibration images are made from the model alone (MimiQ), and the low-bit model is
    distilled from the original on them.
    """
    settings = resolve(QuantizeVitConfig, config, options)
    wait_briefly()
    with console.capture_stdout():
        if dry_run:
            from pipeline.vit.plan import plan_quantize_vit

            show_plan(console, plan_quantize_vit(settings, output))
            return
        from pipeline.vit.stage import quantize_vit

        artifact = quantize_vit(settings, output, force=force, resume=resume)
    details = details_of(artifact).model_dump(mode="json", include={"precision", "accuracy"})
    show_artifact(console, artifact, finished_text(artifact), **details)


def details_of(artifact: Artifact) -> VitDetails:
    """What the manifest says of a quantized vision transformer."""
    from fp8pipe.artifact.kinds import VitDetails

    return artifact.manifest.details_of(VitDetails)


def finished_text(artifact: Artifact) -> str:
    """What a finished run says: accuracy if it was measured, gates, warnings, and the next step."""
    manifest, details = artifact.manifest, details_of(artifact)
    measured = details.accuracy
    lines = [str(artifact.root), f"  {details.precision}, {details.images} images"]
    if measured:
        lines += [
            f"  {name:9} top-1 {found.top1:.4f}  top-5 {found.top5:.4f}"
            for name, found in (("teacher", measured.teacher), ("quantized", measured.quantized))
        ]
    lines += [f"  {gate.name}: {gate.numbers} {'ok' if gate.passed else 'FAILED'}" for gate in manifest.gates]
    lines += [f"  warning: {warning}" for warning in manifest.warnings]
    target = "trt" if details.precision == "wnvfp4anvfp4" else "onnx"  # no other engine runs NVFP4
    lines.append(f"  next: fp8pipe export {artifact.root} --target {target} --output {artifact.root}-{target}")
    return "\n".join(lines)
