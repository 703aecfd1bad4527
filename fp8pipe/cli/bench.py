"""`fp8pipe bench`: speed and size of an export, beside full precision, as a record next to it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import click

from fp8pipe.cli.common import Console, common_options, table

_KINDS = ("onnx-export", "vllm-export")


@click.command("bench")
@click.argument("export", type=click.Path(path_type=Path))
@click.option("--batch", "batches", type=int, multiple=True, help="Vision: images at once; repeatable.  [1 8]")
@click.option("--rounds", type=int, help="Calls of every graph and batch size; requests of a language model.  [20]")
@click.option("--threads", type=int, help="Vision: threads within an operator.  [the runtime's choice]")
@click.option("--concurrency", type=int, help="Language: requests at once, in the second measurement.  [4]")
@click.option("--tokens", type=int, help="Language: tokens of every answer.  [32]")
@click.option("--vllm-python", envvar="FP8PIPE_VLLM_PYTHON", help="Language: Python of the environment with vLLM.")
@click.option("--config", type=click.Path(path_type=Path, dir_okay=False), help="YAML file with any of the settings.")
@common_options(dry_run=True)
def command(
    export: Path, vllm_python: str | None, config: Path | None, dry_run: bool, console: Console, **options: Any
) -> None:
    """Measure EXPORT in its engine on this machine; the record is EXPORT.bench.json.

    Engines of TensorRT are measured by `fp8pipe validate` on a GPU.
    """
    from fp8pipe.artifact import open_artifact
    from fp8pipe.core.config import build_config, load_config
    from validation.bench.config import BenchConfig

    given = {name: value for name, value in options.items() if value not in (None, ())}
    settings = build_config(BenchConfig, given) if config is None else load_config(BenchConfig, config, given)
    artifact = open_artifact(export, kind=_KINDS, verify=False)
    if dry_run:
        show_plan(console, artifact, settings, "bench", vllm_python)
        return
    if artifact.kind == "onnx-export":
        from validation.bench.vision import bench_vision

        record = bench_vision(export, settings)
    else:
        from validation.bench.language import bench_language

        record = bench_language(export, settings, vllm_python=vllm_python)
    show_record(console, export, record)


def show_plan(
    console: Console, artifact: Any, settings: Any, stage: Literal["bench", "serve-check"], vllm_python: str | None
) -> None:
    """What would be measured, what that takes, and the record that would be written."""
    from validation.bench.record import measure_path
    from validation.plan import plan_engine

    record = measure_path(artifact.root, stage)
    plan = plan_engine(artifact, stage, record, vllm_python=vllm_python)
    chosen = settings.model_dump(mode="json")
    plan = dataclasses.replace(plan, facts={**plan.facts, **{k: v for k, v in chosen.items() if v is not None}})
    document = {
        "dry_run": True, "export": str(artifact.root), "kind": artifact.kind, "settings": chosen,
        "writes": str(record), "plan": plan.document(),
    }  # fmt: skip
    console.emit(document, plan.text())


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
