"""`fp8pipe finetune` and `fp8pipe quantize-vit`: change a model's weights and write a single artifact."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fp8pipe.cli.common import Console, common_options, show_artifact, show_plan, stage_options
from fp8pipe.cli.options import model_options, resolve
from fp8pipe.cli.ranks import one_report
from fp8pipe.core.machine import wait_briefly
from pipeline.finetune.config import FinetuneConfig
from pipeline.vit.config import QuantizeVitConfig

if TYPE_CHECKING:
    from fp8pipe.artifact import Artifact
    from fp8pipe.artifact.kinds import HeldoutLoss, VitDetails
    from fp8pipe.core.plan import Plan

C = TypeVar("C", FinetuneConfig, QuantizeVitConfig)


def _run_stage(
    console: Console, read: Callable[[], C], *, plan: Callable[[C], Plan], run: Callable[[C], Artifact | None],
    show: Callable[[Console, Artifact], None], dry_run: bool,
) -> None:  # fmt: skip
    """Run a stage, or plan it, and print the outcome; of several processes, one prints it.

    The functions import what they need, so that `--help` is fast.

    Args:
        console: the command's console.
        read: reads the settings.
        plan: plans the stage, for `dry_run`.
        run: runs the stage; returns None in a process that has only assisted another one.
        show: prints the result, and fails if a gate of the artifact did.
        dry_run: plan the stage only.
    """
    wait_briefly()
    with one_report() as reports:
        settings = read()
        with console.capture_stdout():
            if dry_run:
                if reports:
                    show_plan(console, plan(settings))
                return
            artifact = run(settings)
        if reports and artifact is not None:
            show(console, artifact)


@click.command(name="finetune")
@model_options(FinetuneConfig)
@stage_options("output", "config", "force", "resume")
@common_options(dry_run=True)
def finetune_command(
    *, output: Path, config: Path | None, force: bool, resume: bool, dry_run: bool, console: Console, **options: Any
) -> None:
    """Fine-tune a causal language model in FP8.

    The adapter is merged into the FP8 weights (FALQON); the artifact contains the codes that `export` writes for the
    engine.
    """

    def plan(settings: FinetuneConfig) -> Plan:
        from pipeline.finetune.plan import plan_finetune

        return plan_finetune(settings, output)

    def run(settings: FinetuneConfig) -> Artifact:
        from pipeline.finetune.stage import finetune

        return finetune(settings, output, force=force, resume=resume)

    read = partial(resolve, FinetuneConfig, config, options)
    _run_stage(console, read, plan=plan, run=run, show=_show_finetuned, dry_run=dry_run)


def _show_finetuned(console: Console, artifact: Artifact) -> None:
    show_artifact(
        console, artifact, finetuned_lines(artifact),
        next_export(artifact),
        remedy="train longer, with another learning rate or on more data; the artifact is kept for inspection",
        heldout_loss=_losses(artifact).model_dump(),
    )  # fmt: skip


def finetuned_lines(artifact: Artifact) -> list[str]:
    """Summary lines of a finished run: losses and any problems."""
    losses, manifest = _losses(artifact), artifact.manifest
    return [
        str(artifact.root),
        f"  held-out answer loss: {losses.untuned:.4f} untuned, {losses.deployed:.4f} deployed",
        *(f"  failed gate: {gate}" for gate in manifest.gates if not gate.passed),
        *(f"  warning: {warning}" for warning in manifest.warnings),
    ]


def next_export(artifact: Artifact) -> str:
    """The export command for the first target and format that accept the artifact; else for the first of all."""
    from exporters.target import foresee

    forms = foresee(artifact.root, artifact.kind)
    form = next((words for words, findings in forms.items() if not findings), next(iter(forms)))
    _, target, *_ = form.split()
    return f"fp8pipe export {quote(str(artifact.root))} {form} --output {quote(f'{artifact.root}-{target}')}"


def _losses(artifact: Artifact) -> HeldoutLoss:
    from fp8pipe.artifact.kinds import TunedDetails

    losses = artifact.manifest.details_of(TunedDetails).heldout_loss
    assert losses is not None
    return losses


@click.command(name="quantize-vit")
@model_options(QuantizeVitConfig)
@stage_options("output", "config", "force", "resume")
@click.option(
    "--ray",
    metavar="ADDRESS",
    help="Ray cluster that makes the images and evaluates: auto, local, or ray://HOST:PORT.",
)
@common_options(dry_run=True)
def quantize_vit_command(
    *, output: Path, config: Path | None, force: bool, resume: bool, ray: str | None, dry_run: bool, console: Console,
    **options: Any,
) -> None:  # fmt: skip
    """Quantize a vision transformer to low-bit integers or FP8.

    By default, no data is needed: calibration images are synthesized from the model alone (MimiQ), and used to distill
    the original model into the low-bit model.
    """

    def plan(settings: QuantizeVitConfig) -> Plan:
        from pipeline.vit.plan import plan_quantize_vit

        return plan_quantize_vit(settings, output)

    def run(settings: QuantizeVitConfig) -> Artifact | None:
        from fp8pipe.core.launch import launched
        from pipeline.vit.ranks import assist_quantize_vit, open_pool
        from pipeline.vit.stage import quantize_vit

        place = launched()
        if place is not None and place.rank:
            assist_quantize_vit(settings, place)
            return None
        with open_pool(settings, place, ray) as pool:
            return quantize_vit(settings, output, force=force, resume=resume, pool=pool)

    read = partial(resolve, QuantizeVitConfig, config, options)
    _run_stage(console, read, plan=plan, run=run, show=_show_quantized, dry_run=dry_run)


def _show_quantized(console: Console, artifact: Artifact) -> None:
    from fp8pipe.artifact.kinds import VitDetails

    details = artifact.manifest.details_of(VitDetails)
    facts = details.model_dump(mode="json", include={"precision", "accuracy"})
    target = "trt" if details.precision == "wnvfp4anvfp4" else "onnx"  # no other engine supports NVFP4
    show_artifact(
        console, artifact, _quantized_lines(artifact, details),
        f"fp8pipe export {quote(str(artifact.root))} --target {target} --output {quote(f'{artifact.root}-{target}')}",
        remedy="use more bits, more --distill-steps or pictures (--calibration images:DIR); "
        "the artifact is kept for inspection",
        **facts,
    )  # fmt: skip


def _quantized_lines(artifact: Artifact, details: VitDetails) -> list[str]:
    """Summary lines of a finished run: accuracy if measured, gates and warnings."""
    lines = [str(artifact.root), f"  {details.precision}, {details.images} images"]
    if details.accuracy:
        lines += [
            f"  {name:9} top-1 {found.top1:.4f}  top-5 {found.top5:.4f}"
            for name, found in (("teacher", details.accuracy.teacher), ("quantized", details.accuracy.quantized))
        ]
    manifest = artifact.manifest
    lines += [f"  {gate.name}: {gate.numbers} {'ok' if gate.passed else 'FAILED'}" for gate in manifest.gates]
    return lines + [f"  warning: {warning}" for warning in manifest.warnings]
