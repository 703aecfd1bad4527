"""`fp8pipe finetune`: fine-tune a causal LM in FP8 (or with a baseline) and write one artifact."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from fp8pipe.cli.common import Console, common_options

_METHODS = click.Choice(["falqon", "lora", "qlora"])


@click.command(name="finetune")
@click.option("--model", required=True, help="Directory, hub id, .gguf file or sample:NAME.")
@click.option("--data", required=True, help="JSONL file, hub id or sample:NAME.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="The artifact's directory.")
@click.option("--method", type=_METHODS, help="falqon (default), or a baseline.")
@click.option("--rank", type=int, help="Rank of the adapter.")
@click.option("--update-rule", help="FALQON: live (default), released, accumulate, ...")
@click.option("--rows", type=int, help="FALQON: rows flushed a layer and step (rules that flush).")
@click.option("--initialisation", help="FALQON: where A comes from.")
@click.option("--lora-alpha", type=float, help="lora, qlora: scales the update by alpha / rank.")
@click.option("--learning-rate", type=float, help="Peak learning rate.")
@click.option("--schedule", help="cosine, linear or constant.")
@click.option("--warmup-steps", type=int, help="Steps of linear warm-up.")
@click.option("--optimizer", help="adamw or adamw-8bit.")
@click.option("--steps", type=int, help="Optimizer steps.")
@click.option("--batch-size", type=int, help="Sequences a micro-batch.")
@click.option("--gradient-accumulation", type=int, help="Micro-batches a step.")
@click.option("--gradient-checkpointing/--no-gradient-checkpointing", default=None, help="Recompute activations.")
@click.option("--sequence-length", type=int, help="Tokens a sequence, at most.")
@click.option("--packing/--no-packing", default=None, help="Several examples a sequence, kept apart.")
@click.option("--heldout-fraction", type=float, help="Share of the records kept for evaluation.")
@click.option("--evaluate-every", type=int, help="Steps between evaluations; 0: first and last only.")
@click.option("--save-every", type=int, help="Steps between checkpoints; 0: only the last.")
@click.option("--log-every", type=int, help="Steps between log lines.")
@click.option("--seed", type=int, help="Seed of order, initialisation and rounding.")
@click.option("--device", help="cpu or cuda.")
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
    # Must be set before torch loads its OpenMP: spinning threads of two processes starve each other.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from fp8pipe.config import build_config, load_config
    from pipeline.training.config import FinetuneConfig

    given = {name: value for name, value in options.items() if value is not None}
    resolved = build_config(FinetuneConfig, given) if config is None else load_config(FinetuneConfig, config, given)
    with console.capture_stdout():
        if dry_run:
            from pipeline.plan import plan_finetune

            plan = plan_finetune(resolved)
            console.emit(plan.document(), plan.text())
            return
        from pipeline.finetune import finetune

        artifact = finetune(resolved, output, force=force, resume=resume)
    losses = artifact.manifest.extra["heldout_loss"]
    console.emit(
        {"artifact": str(artifact.root), "digest": artifact.digest, "kind": artifact.kind, "heldout_loss": losses,
         "warnings": artifact.manifest.warnings},
        f"{artifact.root}\n  held-out answer loss: {losses['untuned']:.4f} untuned, {losses['deployed']:.4f} deployed\n"
        f"  next: fp8pipe export {artifact.root} --target vllm --output {artifact.root}-vllm",
        quiet_text=str(artifact.root),
    )  # fmt: skip
