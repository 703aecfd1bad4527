"""`fp8pipe export`: an artifact, or a plain checkpoint, in the form that an engine loads.

The command is made of the registered targets: their names are the choices of `--target`, and their option models the
options. It is made whenever it is asked for, so that a target registered by another package is known, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from exporters.target import ExportTarget, call, choose, kind_of_source, targets
from fp8pipe.artifact import Artifact
from fp8pipe.cli.common import Console, common_options, format_bytes, show_plan, stage_options, table
from fp8pipe.cli.options import foreign, options_of, resolve, union_options
from fp8pipe.core.config import read_yaml
from fp8pipe.core.errors import ConfigurationError


def __getattr__(name: str) -> Any:
    if name == "command":
        return make_command()
    raise AttributeError(name)


def make_command() -> click.Command:
    """The command, for the targets that are registered now."""
    known = targets()
    function: Any = _export
    for decorate in (
        common_options(dry_run=True),
        stage_options("output", "config", "force"),
        union_options({target.label or target.name: target.options for target in known}),
        click.option(
            "--target", type=click.Choice(list(dict.fromkeys(target.name for target in known))), required=True,
            help="; ".join(f"{target.name}: {target.help}" for target in known) + ".",
        ),
        click.argument("artifact", type=click.Path(path_type=Path)),
    ):  # fmt: skip
        function = decorate(function)
    return click.command("export")(function)


def _export(
    artifact: Path, target: str, output: Path, config: Path | None, force: bool, dry_run: bool, console: Console,
    **given: Any,
) -> None:  # fmt: skip
    """Write ARTIFACT in the form that an engine loads; lint before, reopen and compare after.

    ARTIFACT is what `fp8pipe finetune` or `fp8pipe quantize-vit` wrote; for vllm it may be a plain model, too: a
    Hugging Face directory, a hub id, a .gguf file or sample:NAME.
    """
    settings = {} if config is None else read_yaml(config)
    asked = given.get("format") or settings.get("format")
    chosen = choose(target, kind_of_source(artifact), asked)
    _refuse_foreign(given, settings, chosen, config)
    options = resolve(chosen.options, config, given, force=force)
    if dry_run:
        document, plan = call(chosen.plan, artifact, output, options)
        show_plan(console, plan, quiet_text=str(output), target=chosen.name, **document)
        return
    _report(call(chosen.export, artifact, output, options), chosen, artifact, console)


def _refuse_foreign(given: dict[str, Any], settings: dict[str, Any], target: ExportTarget, config: Path | None) -> None:
    """Options of another target are named as they are written; keys that no target has, as unknown ones."""
    known = {option.path: option.flag for other in targets() for option in options_of(other.options)}
    known |= {name: name for other in targets() for name in other.options.model_fields if name != "force"}
    unknown = [key for key in settings if key not in known]
    if unknown:
        raise ConfigurationError(
            f"{config} has unknown keys: {', '.join(unknown)}",
            why=f"an export can be given: {', '.join(name for name in known if '.' not in name)}",
            fix="correct the keys named above",
        )  # fmt: skip
    flags = foreign(given, target.options)
    flags += [f"--{known[key]}" for key in settings if key not in target.options.model_fields]
    if flags:
        names = [flag.removeprefix("--").removeprefix("no-") for flag in flags]
        owners = dict.fromkeys(
            f"--target {other.label or other.name}" for other in targets()
            if {option.flag for option in options_of(other.options)} & set(names)
        )  # fmt: skip
        raise ConfigurationError(
            f"{' and '.join(flags)} cannot be given for --target {target.label or target.name}",
            why=f"made for {' or '.join(owners)}", fix="leave it out",
        )  # fmt: skip


def _report(exported: Artifact, target: ExportTarget, source: Path, console: Console) -> None:
    """What was written, with every gate, and the command that proves it against what it was made from."""
    manifest = exported.manifest
    document = {
        "dry_run": False,
        "target": target.name,
        "path": str(exported.root),
        "kind": exported.kind,
        "digest": exported.digest,
        "size_bytes": exported.size_bytes,
        "format": str(getattr(manifest.details, "format", "")),
        "gates": [gate.model_dump(mode="json") for gate in manifest.gates],
        "warnings": list(manifest.warnings),
    }
    lines = [f"{exported.root}: {len(manifest.files)} files, {format_bytes(exported.size_bytes)}"]
    lines += [table([gate.row for gate in manifest.gates])] if manifest.gates else []
    lines += call(target.after, exported) if target.after is not None else []
    if target.engines:
        against = f" --against {source}" if "against" in target.engines[0].takes else ""
        lines.append(f"  next: fp8pipe validate {exported.root}{against}")
    console.emit(document, "\n".join(lines), quiet_text=str(exported.root))
