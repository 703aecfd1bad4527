"""`fp8pipe serve-check`: does the service of an export answer as it must? A record next to the export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fp8pipe.cli.bench import show_measure_plan, show_record
from fp8pipe.cli.common import Console, common_options, stage_options
from fp8pipe.cli.options import model_options, resolve
from validation.bench.record import ServeCheckConfig


@click.command("serve-check")
@click.argument("export", type=click.Path(path_type=Path))
@model_options(ServeCheckConfig)
@stage_options("config")
@common_options(dry_run=True)
def command(export: Path, config: Path | None, dry_run: bool, console: Console, **options: Any) -> None:
    """Start `fp8pipe serve` on EXPORT, ask it, end it; exit 14 when an answer is wrong.

    The record is EXPORT.serve-check.json.
    """
    from exporters.target import open_export
    from validation.bench.check import serve_check

    settings = resolve(ServeCheckConfig, config, options)
    if dry_run:
        show_measure_plan(console, *open_export(export, lambda known: known.service.ask), settings, "serve-check")
        return
    show_record(console, export, serve_check(export, settings))
