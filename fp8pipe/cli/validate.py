"""`fp8pipe validate`: load an export in its engine and prove that it serves what was made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fp8pipe.cli.common import Console, common_options

if TYPE_CHECKING:
    from exporters.target import Engine, ExportTarget
    from fp8pipe.artifact import Artifact


@click.command("validate")
@click.argument("export", type=click.Path(path_type=Path))
@click.option(
    "--engine",
    help="The engine; default: the one the export is for.",
)
@click.option(
    "--vllm-python",
    envvar="FP8PIPE_VLLM_PYTHON",
    help="Python of the environment that holds vLLM; default: .venv-vllm, or this one.",
)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="The artifact that was exported: also prove that the export holds its weights.",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    help="onnxruntime: image folder; compare classes on up to 500 of its pictures (needs --against).",
)
@common_options(dry_run=True)
def command(
    export: Path,
    engine: str | None,
    vllm_python: str | None,
    against: Path | None,
    images: Path | None,
    dry_run: bool,
    console: Console,
) -> None:
    """Run EXPORT in its engine and compare with its manifest; exit 14 when it does not hold.

    The record is written beside the export, as EXPORT.validation.json.
    """
    from exporters.target import call, choose_engine, open_export, targets
    from fp8pipe.artifact.record import ExportRejectedError

    artifact, target = open_export(export, lambda known: known.engines)
    known = dict.fromkeys(found.name for other in targets() for found in other.engines)
    if engine is not None and engine not in known:
        raise click.UsageError(f"--engine {engine}: choose from {', '.join(known)}")
    options = {"against": against, "images": images, "vllm_python": vllm_python}
    chosen, given = choose_engine(artifact, target, engine, options)
    if dry_run:
        _show_plan(artifact, target, chosen, given, console)
        return
    rejection = None
    try:
        record = call(chosen.validate, export, **given)
    except ExportRejectedError as error:
        rejection, record = error, error.record
    console.emit(record.model_dump(mode="json"), call(chosen.describe, export, record), quiet_text=record.verdict)
    if rejection is not None:
        raise rejection


def _show_plan(
    artifact: Artifact, target: ExportTarget, engine: Engine, given: dict[str, Any], console: Console
) -> None:
    from exporters.target import call
    from fp8pipe.artifact.record import record_path

    plan = call(target.service.plan or "", artifact, "validate", record_path(artifact.root), **given)
    document = {"dry_run": True, "export": str(artifact.root), "engine": engine.name, "plan": plan.document()}
    console.emit(document, plan.text())
