"""`fp8pipe bench`: speed and size of an export, beside full precision, as a record next to it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import click

from fp8pipe.cli.common import Console, common_options, show_plan, stage_options, table
from fp8pipe.cli.options import model_options, resolve
from validation.bench.record import BenchConfig


@click.command("bench")
@click.argument("export", type=click.Path(path_type=Path))
@model_options(BenchConfig)
@click.option("--vllm-python", envvar="FP8PIPE_VLLM_PYTHON", help="Language: Python of the environment with vLLM.")
@stage_options("config")
@common_options(dry_run=True)
def command(
    export: Path, vllm_python: str | None, config: Path | None, dry_run: bool, console: Console, **options: Any
) -> None:
    """Measure EXPORT in its engine on this machine; the record is EXPORT.bench.json.

    Engines of TensorRT are measured by `fp8pipe validate` on a GPU.
    """
    from exporters.target import call, open_export

    settings = resolve(BenchConfig, config, options)
    artifact, target = open_export(export, lambda known: known.service.bench)
    extra = {"vllm_python": vllm_python} if target.service.domain == "language" else {}
    if dry_run:
        show_measure_plan(console, artifact, target, settings, "bench", **extra)
        return
    show_record(console, export, call(target.service.bench or "", export, settings, **extra))


def show_measure_plan(
    console: Console, artifact: Any, target: Any, settings: Any, stage: Literal["bench", "serve-check"], **extra: Any
) -> None:
    """What would be measured, what that takes, and the record that would be written."""
    from exporters.target import call
    from validation.bench.record import measure_path

    record = measure_path(artifact.root, stage)
    plan = call(target.service.plan, artifact, stage, record, **extra)
    chosen = settings.model_dump(mode="json")
    plan = dataclasses.replace(plan, facts={**plan.facts, **{k: v for k, v in chosen.items() if v is not None}})
    show_plan(console, plan, export=str(artifact.root), kind=artifact.kind, settings=chosen, writes=str(record))


def show_record(console: Console, export: Path, record: Any) -> None:
    """The figures, and a rejection as exit 14."""
    rows = [(row.what, f"{row.value:,.4g} {row.unit}".strip(), row.detail) for row in record.rows]
    lines = [f"{record.verdict}  {export}", table(rows), *(f"  not measured: {text}" for text in record.not_measured)]
    console.emit(record.model_dump(mode="json"), "\n".join(lines), quiet_text=record.verdict)
    if record.verdict != "ACCEPT":
        from fp8pipe.core.errors import GateFailedError

        raise GateFailedError(
            f"{export} does not hold", why="; ".join(record.reasons), fix="see the record beside the export"
        )
