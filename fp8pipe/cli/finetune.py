"""`fp8pipe finetune`: fine-tune a causal LM in FP8 (or with a baseline) and write one artifact."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fp8pipe.cli.common import Console, common_options, show_artifact, show_plan, stage_options
from fp8pipe.cli.options import model_options, resolve
from fp8pipe.core.machine import wait_briefly
from pipeline.finetune.config import FinetuneConfig

if TYPE_CHECKING:
    from fp8pipe.artifact import Artifact
    from fp8pipe.artifact.kinds import HeldoutLoss


@click.command(name="finetune")
@model_options(FinetuneConfig)
@stage_options("output", "config", "force", "resume")
@common_options(dry_run=True)
def command(
    *, output: Path, config: Path | None, force: bool, resume: bool, dry_run: bool, console: Console, **options: Any
) -> None:
    """Fine-tune a causal language model in FP8.

    The adapter lives in the FP8 weights (FALQON); the artifact holds the codes that `export` hands to the engine.
    """
    settings = resolve(FinetuneConfig, config, options)
    wait_briefly()
    with console.capture_stdout():
        if dry_run:
            from pipeline.finetune.plan import plan_finetune

            show_plan(console, plan_finetune(settings, output))
            return
        from pipeline.finetune.stage import finetune

        artifact = finetune(settings, output, force=force, resume=resume)
    losses = losses_of(artifact)
    show_artifact(console, artifact, finished_text(artifact), heldout_loss=losses.model_dump())


def losses_of(artifact: Artifact) -> HeldoutLoss:
    """Held-out losses of a run that has ended."""
    from fp8pipe.artifact.kinds import TunedDetails

    losses = artifact.manifest.details_of(TunedDetails).heldout_loss
    assert losses is not None
    return losses


def finished_text(artifact: Artifact) -> str:
    """What a finished run says: losses, whatever is wrong, and the next step."""
    losses = losses_of(artifact)
    failed = [gate for gate in artifact.manifest.gates if not gate.passed]
    lines = [
        str(artifact.root),
        f"  held-out answer loss: {losses.untuned:.4f} untuned, {losses.deployed:.4f} deployed",
        *(f"  failed gate: {gate}" for gate in failed),
        *(f"  warning: {warning}" for warning in artifact.manifest.warnings),
        f"  next: fp8pipe export {artifact.root} --target vllm --output {artifact.root}-vllm",
    ]
    return "\n".join(lines)
