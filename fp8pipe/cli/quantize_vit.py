"""`fp8pipe quantize-vit`: quantize a vision transformer, by default without any data.

Choices and defaults are repeated here as literals, because help must answer without importing torch; a test compares
them with the configuration's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fp8pipe.cli.common import Console, common_options
from fp8pipe.core.threads import wait_briefly

if TYPE_CHECKING:
    from fp8pipe.artifact import Artifact

EDGES = ("8bit", "same")
# Options of nested settings: flag's name -> (section, field).
NESTED = {"synthesis_steps": ("synthesis", "steps"), "distill_steps": ("distill", "steps")}


@click.command(name="quantize-vit")
@click.option("--model", help="Directory, timm:NAME or sample:NAME; required, here or in --config.")
@click.option("--bits", help="wXaY with 2 to 8 bits each, wfp8afp8, or wnvfp4anvfp4; required, here or in --config.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="The artifact's directory.")
@click.option(
    "--calibration", help="synthetic, gaussian, patch-similarity, images:DIR, artifact:DIR [default: synthetic]"
)
@click.option("--images", type=int, help="Calibration images.  [default: 128]")
@click.option("--synthesis-steps", type=int, help="Optimizer steps a synthetic image.  [default: 60]")
@click.option("--distill-steps", type=int, help="Steps of distillation; 0 only measures ranges.  [default: 200]")
@click.option("--edges", type=click.Choice(EDGES), help="Precision of first and last layer.  [default: 8bit]")
@click.option("--evaluate", help="Folder of labelled pictures (one folder a class) to measure accuracy on.")
@click.option("--seed", type=int, help="Seed of images, order and augmentation.  [default: 0]")
@click.option("--config", type=click.Path(path_type=Path, dir_okay=False), help="YAML file with any settings.")
@click.option("--force", is_flag=True, help="Replace an existing artifact.")
@click.option("--resume", is_flag=True, help="Continue the unfinished run of --output.")
@common_options(dry_run=True)
def command(
    *, output: Path, config: Path | None, force: bool, resume: bool, dry_run: bool, console: Console, **options: Any
) -> None:
    """Quantize a vision transformer to low-bit integers or FP8.

    By default no data is needed: calibration images are made from the model alone (MimiQ), and the low-bit model is
    distilled from the original on them.
    """
    given = {name: value for name, value in options.items() if value is not None}
    missing = [f"--{name}" for name in ("model", "bits") if name not in given]
    if config is None and missing:
        raise click.UsageError(f"Missing option {' and '.join(missing)} (or a --config file that sets it).")
    wait_briefly()
    from fp8pipe.core.config import build_config, load_config
    from pipeline.vit.config import QuantizeVitConfig

    for flag, (section, field) in NESTED.items():
        if flag in given:
            given.setdefault(section, {})[field] = given.pop(flag)
    resolved = (
        build_config(QuantizeVitConfig, given) if config is None else load_config(QuantizeVitConfig, config, given)
    )
    with console.capture_stdout():
        if dry_run:
            from pipeline.vit.plan import plan_quantize_vit

            plan = plan_quantize_vit(resolved, output)
            console.emit({"dry_run": True, "plan": plan.document()}, plan.text())
            return
        from pipeline.vit.stage import quantize_vit

        artifact = quantize_vit(resolved, output, force=force, resume=resume)
    manifest = artifact.manifest
    console.emit(
        {"artifact": str(artifact.root), "digest": artifact.digest, "kind": artifact.kind,
         "precision": manifest.extra["precision"], "accuracy": manifest.extra["accuracy"],
         "gates": [gate.model_dump() for gate in manifest.gates], "warnings": manifest.warnings},
        finished_text(artifact),
        quiet_text=str(artifact.root),
    )  # fmt: skip


def finished_text(artifact: Artifact) -> str:
    """What a finished run says: accuracy if it was measured, gates, warnings, and the next step."""
    manifest = artifact.manifest
    measured = manifest.extra["accuracy"]
    lines = [str(artifact.root), f"  {manifest.extra['precision']}, {manifest.extra['images']} images"]
    if measured:
        lines += [
            f"  {name:9} top-1 {measured[name]['top1']:.4f}  top-5 {measured[name]['top5']:.4f}"
            for name in ("teacher", "quantized")
        ]
    for gate in manifest.gates:
        verdict = "ok" if gate.passed else "FAILED"
        lines.append(f"  {gate.name}: {gate.value:g} ({gate.threshold:g}) {verdict}")
    lines += [f"  warning: {warning}" for warning in manifest.warnings]
    target = "trt" if manifest.extra["precision"] == "wnvfp4anvfp4" else "onnx"  # no other engine runs NVFP4
    lines.append(f"  next: fp8pipe export {artifact.root} --target {target} --output {artifact.root}-{target}")
    return "\n".join(lines)
