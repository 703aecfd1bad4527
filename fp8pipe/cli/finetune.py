"""`fp8pipe finetune`: fine-tune a causal LM in FP8 (or with a baseline) and write one artifact.

Choices and defaults are repeated here as literals, because help must answer without importing torch; a test compares
them with the configuration's own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fp8pipe.cli.common import Console, common_options
from fp8pipe.core.threads import wait_briefly

if TYPE_CHECKING:
    from fp8pipe.artifact import Artifact

METHODS = ("falqon", "lora", "qlora")
UPDATE_RULES = (
    "live", "live-nearest", "live-flush", "released", "live-svd",
    "accumulate", "accumulate-feedback", "accumulate-stochastic",
)  # fmt: skip
INITIALISATIONS = ("svd", "randomized-svd", "random", "gradient")
SCHEDULES = ("cosine", "linear", "constant")
OPTIMIZERS = ("adamw", "adamw-8bit")
DEVICES = ("cpu", "cuda")


def _setting(flag: str, kind: Any, default: str, text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """An option that, when not given, leaves the setting to `--config` or the default that help shows."""
    kind = click.Choice(kind) if isinstance(kind, tuple) else kind
    # A flag without a type of its own: `--packing/--no-packing`.
    typed = {} if kind is bool else {"type": kind}
    return click.option(flag, default=None, help=f"{text}  [default: {default}]", **typed)


@click.command(name="finetune")
@click.option("--model", help="Directory, hub id, .gguf file or sample:NAME; required, here or in --config.")
@click.option("--data", help="JSONL file, hub id or sample:NAME; required, here or in --config.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="The artifact's directory.")
@_setting("--method", METHODS, "falqon", "How to tune; lora and qlora are baselines.")
@_setting("--rank", int, "64", "Rank of the adapter.")
@_setting("--update-rule", UPDATE_RULES, "live", "FALQON: how updates enter the FP8 codes.")
@_setting("--rows", int, "the rank", "FALQON: rows flushed a layer and step, by rules that flush.")
@_setting("--initialisation", INITIALISATIONS, "the update rule's", "FALQON: where A comes from.")
@_setting("--lora-alpha", float, "the rank", "lora, qlora: the update is scaled by alpha / rank.")
@_setting("--learning-rate", float, "0.001", "Peak learning rate.")
@_setting("--schedule", SCHEDULES, "cosine", "Shape of the learning rate after warm-up.")
@_setting("--warmup-steps", int, "5", "Steps of linear warm-up.")
@_setting("--optimizer", OPTIMIZERS, "adamw", "Optimizer; 8-bit needs bitsandbytes.")
@_setting("--steps", int, "60", "Optimizer steps.")
@_setting("--batch-size", int, "4", "Sequences a micro-batch.")
@_setting("--gradient-accumulation", int, "1", "Micro-batches a step.")
@_setting(
    "--gradient-checkpointing/--no-gradient-checkpointing", bool, "no-gradient-checkpointing", "Recompute activations."
)
@_setting("--sequence-length", int, "256", "Tokens a sequence, at most.")
@_setting("--packing/--no-packing", bool, "packing", "Several examples a sequence, kept apart.")
@_setting("--heldout-fraction", float, "0.1", "Share of the records kept for evaluation.")
@_setting("--evaluate-every", int, "50", "Steps between evaluations; 0: first and last only.")
@_setting("--save-every", int, "50", "Steps between checkpoints; 0: only the last.")
@_setting("--log-every", int, "5", "Steps between log lines.")
@_setting("--seed", int, "0", "Seed of order, initialisation and rounding.")
@_setting("--device", DEVICES, "cpu", "Where to train.")
@click.option("--config", type=click.Path(path_type=Path, dir_okay=False), help="YAML file with any of these.")
@click.option("--force", is_flag=True, help="Replace an existing artifact.")
@click.option("--resume", is_flag=True, help="Continue the unfinished run of --output.")
@common_options(dry_run=True)
def command(
    *, output: Path, config: Path | None, force: bool, resume: bool, dry_run: bool, console: Console, **options: Any
) -> None:
    """Fine-tune a causal language model in FP8.

    The adapter lives in the FP8 weights (FALQON); the artifact holds the codes that `export` hands to the engine.
    """
    given = {name: value for name, value in options.items() if value is not None}
    missing = [f"--{name}" for name in ("model", "data") if name not in given]
    if config is None and missing:
        raise click.UsageError(f"Missing option {' and '.join(missing)} (or a --config file that sets it).")
    wait_briefly()
    from fp8pipe.core.config import build_config, load_config
    from pipeline.finetune.config import FinetuneConfig

    resolved = build_config(FinetuneConfig, given) if config is None else load_config(FinetuneConfig, config, given)
    with console.capture_stdout():
        if dry_run:
            from pipeline.finetune.plan import plan_finetune

            plan = plan_finetune(resolved, output)
            console.emit({"dry_run": True, "plan": plan.document()}, plan.text())
            return
        from pipeline.finetune.stage import finetune

        artifact = finetune(resolved, output, force=force, resume=resume)
    manifest = artifact.manifest
    console.emit(
        {"artifact": str(artifact.root), "digest": artifact.digest, "kind": artifact.kind,
         "heldout_loss": manifest.extra["heldout_loss"], "gates": [gate.model_dump() for gate in manifest.gates],
         "warnings": manifest.warnings},
        finished_text(artifact),
        quiet_text=str(artifact.root),
    )  # fmt: skip


def finished_text(artifact: Artifact) -> str:
    """What a finished run says: losses, whatever is wrong, and the next step."""
    losses = artifact.manifest.extra["heldout_loss"]
    failed = [gate for gate in artifact.manifest.gates if not gate.passed]
    lines = [
        str(artifact.root),
        f"  held-out answer loss: {losses['untuned']:.4f} untuned, {losses['deployed']:.4f} deployed",
        *(f"  failed gate: {gate.name}: {gate.value:g} ({gate.threshold:g}) {gate.detail}".rstrip() for gate in failed),
        *(f"  warning: {warning}" for warning in artifact.manifest.warnings),
        f"  next: fp8pipe export {artifact.root} --target vllm --output {artifact.root}-vllm",
    ]
    return "\n".join(lines)
