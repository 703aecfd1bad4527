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
    from exporters.target import call, open_export
    from fp8pipe.artifact.record import ExportRejectedError

    artifact, target = open_export(export, lambda known: known.engines)
    chosen = _engine(artifact, target, engine)
    given = _understood(chosen, {"against": against, "images": images, "vllm_python": vllm_python})
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


def _engine(artifact: Artifact, target: ExportTarget, name: str | None) -> Engine:
    """The engine for this kind of export."""
    from exporters.target import targets
    from fp8pipe.core.errors import ConfigurationError

    known = dict.fromkeys(engine.name for other in targets() for engine in other.engines)
    if name is not None and name not in known:
        raise click.UsageError(f"--engine {name}: choose from {', '.join(known)}")
    found = next((engine for engine in target.engines if name in (None, engine.name)), None)
    if found is None:
        raise ConfigurationError(
            f"{artifact.root} cannot be validated in {name}",
            why=f"it is of the kind {artifact.kind}, made for {target.engines[0].name}",
            fix=f"--engine {target.engines[0].name}, or none",
        )
    return found


def _understood(engine: Engine, options: dict[str, Any]) -> dict[str, Any]:
    """What was given, for an engine that takes it; refused otherwise, but for the Python of vLLM, which is often set."""
    from fp8pipe.core.errors import ConfigurationError

    given = {name: value for name, value in options.items() if value is not None}
    foreign = [f"--{name}" for name in given if name not in (*engine.takes, "vllm_python")]
    if foreign:
        raise ConfigurationError(
            f"{' and '.join(foreign)} cannot be given for {engine.name}", why="nothing is compared with it there",
            fix="leave it out",
        )  # fmt: skip
    return {name: value for name, value in given.items() if name in engine.takes}


def _show_plan(
    artifact: Artifact, target: ExportTarget, engine: Engine, given: dict[str, Any], console: Console
) -> None:
    from exporters.target import call
    from fp8pipe.artifact.record import record_path

    plan = call(target.service.plan or "", artifact, "validate", record_path(artifact.root), **given)
    document = {"dry_run": True, "export": str(artifact.root), "engine": engine.name, "plan": plan.document()}
    console.emit(document, plan.text())
