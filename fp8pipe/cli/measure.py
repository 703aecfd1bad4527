"""`fp8pipe validate`, `bench` and `serve-check`: run an export in its engine and write a record next to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import click

from exporters.vllm.form import ServingForm
from fp8pipe.cli.common import PATH, Console, common_options, show_plan, stage_options, table
from fp8pipe.cli.options import model_options, resolve
from fp8pipe.core.devices import DeviceName
from validation.bench.record import BenchConfig, ServeCheckConfig

_EXPORT = click.argument("export", type=PATH)


@click.command("validate")
@_EXPORT
@click.option("--engine", help="The engine; default: the one the export is for.")
@click.option(
    "--vllm-python",
    envvar="FP8PIPE_VLLM_PYTHON",
    help="Python of the environment that holds vLLM; default: .venv-vllm, or this one.",
)
@click.option(
    "--against",
    type=PATH,
    help="The artifact or model that was exported, if it was moved; the export is compared with it.",
)
@click.option(
    "--images",
    type=PATH,
    help="onnxruntime: image folder; compare classes on up to 500 of its pictures (needs --against).",
)
@model_options(ServingForm)
@stage_options("device", "config")
@common_options(dry_run=True)
def validate_command(
    export: Path, engine: str | None, vllm_python: str | None, against: Path | None, images: Path | None,
    device: DeviceName | None, config: Path | None, dry_run: bool, console: Console, **form: Any,
) -> None:  # fmt: skip
    """Run EXPORT in its engine and compare the results with its manifest; exit 14 if the export is rejected.

    The record is written next to the export, as EXPORT.validation.json. For a language export, serving options (such as
    the context length) select the configuration that is validated; --config is a YAML file of them.
    """
    from exporters.target import call, choose_engine, engine_device, open_export, targets
    from fp8pipe.artifact.record import ExportRejectedError, record_path

    artifact, target = open_export(export, lambda known: known.engines)
    known = dict.fromkeys(found.name for other in targets() for found in other.engines)
    if engine is not None and engine not in known:
        raise click.UsageError(f"--engine {engine}: choose from {', '.join(known)}")
    options: dict[str, Any] = {"against": against, "images": images, "vllm_python": vllm_python}
    if config is not None or any(value is not None for value in form.values()):
        options["form"] = resolve(ServingForm, config, form)
    chosen, given = choose_engine(artifact, target, engine, options)
    found = engine_device(target, device, "validate", **given)
    if device is not None and "device" in chosen.takes:
        given["device"] = device
    if dry_run:
        plan = call(target.service.plan or "", artifact, "validate", record_path(artifact.root), **given)
        if found is not None:
            plan = dataclasses.replace(plan, facts={**plan.facts, "device": str(found)})
        show_plan(console, plan, export=str(artifact.root), engine=chosen.name)
        return
    rejection = None
    try:
        record = call(chosen.validate, export, **given)
    except ExportRejectedError as error:
        rejection, record = error, error.record
    console.emit(record.model_dump(mode="json"), call(chosen.describe, export, record), quiet_text=record.verdict)
    if rejection is not None:
        raise rejection


@click.command("bench")
@_EXPORT
@model_options(BenchConfig)
@click.option("--vllm-python", envvar="FP8PIPE_VLLM_PYTHON", help="Language: Python of the environment with vLLM.")
@stage_options("config")
@common_options(dry_run=True)
def bench_command(
    export: Path, vllm_python: str | None, config: Path | None, dry_run: bool, console: Console, **options: Any
) -> None:
    """Measure EXPORT in its engine on this machine; the record is EXPORT.bench.json.

    TensorRT engines are measured by `fp8pipe validate` on a GPU instead.
    """
    from exporters.target import call, engine_device, open_export

    settings = resolve(BenchConfig, config, options)
    artifact, target = open_export(export, lambda known: known.service.bench)
    extra = {"vllm_python": vllm_python} if target.service.domain == "language" else {}
    found = engine_device(target, settings.device, "bench", **extra)
    if found is not None:
        settings = settings.model_copy(update={"device": found.name})
    if dry_run:
        _show_plan(console, artifact, target, settings, "bench", **extra)
        return
    _show_record(console, export, call(target.service.bench or "", export, settings, **extra))


@click.command("serve-check")
@_EXPORT
@model_options(ServeCheckConfig)
@stage_options("config")
@common_options(dry_run=True)
def serve_check_command(export: Path, config: Path | None, dry_run: bool, console: Console, **options: Any) -> None:
    """Start `fp8pipe serve` on EXPORT, send requests, and stop it; exit 14 if an answer is wrong.

    The record is EXPORT.serve-check.json.
    """
    from exporters.target import open_export
    from validation.bench.check import serve_check

    settings = resolve(ServeCheckConfig, config, options)
    if dry_run:
        _show_plan(console, *open_export(export, lambda known: known.service.ask), settings, "serve-check")
        return
    _show_record(console, export, serve_check(export, settings))


def _show_plan(
    console: Console, artifact: Any, target: Any, settings: Any, stage: Literal["bench", "serve-check"], **extra: Any
) -> None:
    """Show what would be measured, what it needs, and which record would be written."""
    from exporters.target import call
    from validation.bench.record import measure_path

    record = measure_path(artifact.root, stage)
    plan = call(target.service.plan, artifact, stage, record, **extra)
    chosen = settings.model_dump(mode="json")
    told = {key: value for key, value in chosen.items() if value is not None and _applies(settings, key, target)}
    plan = dataclasses.replace(plan, facts={**plan.facts, **told})
    show_plan(console, plan, export=str(artifact.root), kind=artifact.kind, settings=chosen, writes=str(record))


def _applies(settings: Any, key: str, target: Any) -> bool:
    """Whether a setting applies to this export's domain (language or vision), according to its description."""
    description = str(type(settings).model_fields[key].description).lower()
    domains = [domain for domain in ("vision", "language") if f"{domain}:" in description]
    return not domains or target.service.domain in domains


def _show_record(console: Console, export: Path, record: Any) -> None:
    """Print the figures of a record.

    Raises:
        GateFailedError: the record's verdict is not ACCEPT.
    """
    rows = [(row.what, f"{row.value:,.4g} {row.unit}".strip(), row.detail) for row in record.rows]
    # A measurement without gates has no verdict, so its figures must not look as if they had been judged.
    heading = record.verdict if record.gates else "MEASURED"
    lines = [f"{heading}  {export}", table(rows), *(f"  not measured: {text}" for text in record.not_measured)]
    lines += _slower(record.rows)
    console.emit(record.model_dump(mode="json"), "\n".join(lines), quiet_text=heading)
    if record.verdict != "ACCEPT":
        from fp8pipe.core.errors import GateFailedError

        raise GateFailedError(
            f"{export} was not accepted", why="; ".join(record.reasons), fix="see the record beside the export"
        )


def _slower(rows: Sequence[Any]) -> list[str]:
    """A sentence for each case in which the export is slower than its baseline."""
    slow = [row for row in rows if row.name.startswith("speedup_") and row.value < 1]
    if not slow:
        return []
    found = ", ".join(f"{row.value:.2f}x with {row.what.rpartition(', ')[2]}" for row in slow)
    return [f"  slower than floating point on this machine: {found}"]
