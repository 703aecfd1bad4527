"""`fp8pipe serve-check`: does the service of an export answer as it must? A record next to the export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fp8pipe.cli.bench import show_plan, show_record
from fp8pipe.cli.common import Console, common_options


@click.command("serve-check")
@click.argument("export", type=click.Path(path_type=Path))
@click.option("--images", type=int, help="Vision: pictures that are sent.  [8]")
@click.option("--prompt", "prompts", multiple=True, help="Language: a question; repeatable.  [two of ours]")
@click.option("--tokens", type=int, help="Language: longest answer.  [24]")
@click.option("--ready-s", type=float, help="Longest wait for the service to be ready, seconds.  [600]")
@click.option("--config", type=click.Path(path_type=Path, dir_okay=False), help="YAML file with any of the settings.")
@common_options(dry_run=True)
def command(export: Path, config: Path | None, dry_run: bool, console: Console, **options: Any) -> None:
    """Start `fp8pipe serve` on EXPORT, ask it, end it; exit 14 when an answer is wrong.

    The record is EXPORT.serve-check.json.
    """
    from fp8pipe.artifact import open_artifact
    from fp8pipe.core.config import build_config, load_config
    from validation.bench.check import KINDS, serve_check
    from validation.bench.config import ServeCheckConfig

    given = {name: value for name, value in options.items() if value not in (None, ())}
    settings = build_config(ServeCheckConfig, given) if config is None else load_config(ServeCheckConfig, config, given)
    if dry_run:
        show_plan(console, open_artifact(export, kind=KINDS, verify=False), settings, "serve-check", None)
        return
    show_record(console, export, serve_check(export, settings))
