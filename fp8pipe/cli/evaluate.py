"""`fp8pipe evaluate`: the scores of a language export on tasks, beside those of other models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fp8pipe.cli.common import PATH, Console, common_options, show_plan, stage_options
from fp8pipe.cli.options import model_options, resolve
from validation.tasks.record import EvaluateConfig


@click.command("evaluate")
@click.argument("export", type=PATH)
@model_options(EvaluateConfig)
@click.option("--vllm-python", envvar="FP8PIPE_VLLM_PYTHON", help="Python of the environment with vLLM.")
@stage_options("config")
@common_options(dry_run=True)
def evaluate_command(
    export: Path, vllm_python: str | None, config: Path | None, dry_run: bool, console: Console, **options: Any
) -> None:
    """Score EXPORT on multiple-choice tasks of the EleutherAI harness; the record is EXPORT.evaluate.json.

    Scores have standard errors; with --against, differences are computed question by question. Serving options (such as
    the compute dtype) select how vLLM is started. Thresholds belong into a recipe.
    """
    settings = resolve(EvaluateConfig, config, options)
    if dry_run:
        from exporters.vllm.target import KIND
        from fp8pipe.artifact import open_artifact
        from validation.plan import plan_tasks

        artifact = open_artifact(export, kind=KIND, verify=False)
        show_plan(console, plan_tasks(artifact, settings, vllm_python=vllm_python), export=str(export))
        return
    from validation.tasks.evaluate import describe, evaluate_export

    record = evaluate_export(export, settings, vllm_python=vllm_python)
    console.emit(record.model_dump(mode="json"), describe(export, record), quiet_text="MEASURED")
