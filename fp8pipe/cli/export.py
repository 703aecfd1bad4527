"""`fp8pipe export` writes an artifact, or a plain checkpoint, in a format that an engine loads; also `fp8pipe lint`.

`export` is built from the registered targets: their names are the choices of `--target`, and their option models define
the options. The command is rebuilt on each access, so that targets registered by other packages are included.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import click

from exporters.target import ExportTarget, call, choose, kind_of_source, targets
from fp8pipe.cli.common import (
    PATH,
    Console,
    common_options,
    format_bytes,
    next_step,
    require_gates,
    show_plan,
    stacked,
    stage_options,
    table,
)
from fp8pipe.cli.options import foreign, options_of, resolve, union_options
from fp8pipe.core.config import read_yaml
from fp8pipe.core.errors import ConfigurationError

if TYPE_CHECKING:
    from fp8pipe.artifact import Artifact
    from fp8pipe.artifact.finding import Finding


def __getattr__(name: str) -> Any:
    if name == "export_command":
        return make_command()
    raise AttributeError(name)


def make_command() -> click.Command:
    """The export command for the targets that are registered now."""
    known = targets()
    options = [
        click.argument("artifact", type=PATH),
        click.option(
            "--target", type=click.Choice(list(dict.fromkeys(target.name for target in known))), required=True,
            help="; ".join(f"{target.name}: {target.help}" for target in known) + ".",
        ),
        union_options({target.label or target.name: target.options for target in known}),
        stage_options("output", "config", "force"),
        common_options(dry_run=True),
    ]  # fmt: skip
    return click.command("export")(stacked(options)(_export))


def _export(
    artifact: Path, target: str, output: Path, config: Path | None, force: bool, dry_run: bool, console: Console,
    **given: Any,
) -> None:  # fmt: skip
    """Write ARTIFACT in a format that an engine loads; lint it first, then reopen it and compare it with its source.

    ARTIFACT is the output of `fp8pipe finetune` or `fp8pipe quantize-vit`. For vllm, it may also be an unquantized
    model: a Hugging Face directory, a hub id, a .gguf file or sample:NAME.
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
    """Refuse unknown keys, and options and keys of other targets.

    Args:
        given: command-line options by parameter name.
        settings: the keys and values of the file.
        target: the chosen target.
        config: the file, named in the message.

    Raises:
        ConfigurationError: names each of them as the user wrote it.
    """
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
    """Report what was written, with every gate, and the command that verifies the export against its source."""
    manifest = exported.manifest
    document = {
        "dry_run": False, "target": target.name, "path": str(exported.root), "kind": exported.kind,
        "digest": exported.digest, "size_bytes": exported.size_bytes,
        "format": str(getattr(manifest.details, "format", "")),
        "gates": [gate.model_dump(mode="json") for gate in manifest.gates], "warnings": list(manifest.warnings),
    }  # fmt: skip
    lines = [f"{exported.root}: {len(manifest.files)} files, {format_bytes(exported.size_bytes)}"]
    lines += [table([gate.row for gate in manifest.gates])] if manifest.gates else []
    lines += call(target.after, exported) if target.after is not None else []
    if target.engines:
        against = f" --against {quote(str(source))}" if "against" in target.engines[0].takes else ""
        lines += next_step(exported, f"fp8pipe validate {quote(str(exported.root))}{against}")
    console.emit(document, "\n".join(lines), quiet_text=str(exported.root))
    require_gates(exported, "do not deploy it; make its source again, or report it")


def _capabilities(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    for text in value:
        if not re.fullmatch(r"\d+\.\d+", text):
            raise click.BadParameter(f"{text!r} is not a compute capability; write for instance 8.9", ctx, param)
    return value


@click.command("lint")
@click.argument("graph", type=PATH)
@click.option(
    "--compute-capability", "capabilities", multiple=True, callback=_capabilities,
    help="GPUs to compile for, for instance 8.9; without it, no dtype is checked against a GPU.",
)  # fmt: skip
@click.option(
    "--no-require", is_flag=True, help="Accept matrix products that would run in another precision than the stored one."
)
@common_options()
def lint_command(graph: Path, capabilities: tuple[str, ...], no_require: bool, console: Console) -> None:
    """Lint the ONNX file GRAPH, from any source. All findings are listed; any error gives exit code 13."""
    from exporters.graph.runtime import import_onnx_package

    import_onnx_package("onnx_ir")
    from exporters.tensorrt.lint import lint_file
    from fp8pipe.artifact.finding import LintFindingsError

    report = lint_file(graph, capabilities)
    errors, warnings = (found(require=not no_require) for found in (report.errors, report.warnings))
    document = {"path": str(graph), "compute_capabilities": capabilities, "findings": _plain(report.findings)}
    text = f"{graph}: {len(errors)} error(s), {len(warnings)} warning(s)"
    rows = _rows(errors, warnings)
    console.emit(document, "\n".join([text, *([table(rows)] if rows else [])]))
    if errors:
        raise LintFindingsError(errors, str(graph), "built", report.waivable(require=not no_require))


def _rows(errors: Sequence[Finding], warnings: Sequence[Finding]) -> list[tuple[str, str, str, str]]:
    """Table rows: per rule, its effect on an engine build and the number of errors; then every warning."""
    from exporters.tensorrt.lint import RULES

    counts = Counter(found.rule for found in errors)
    told = [(str(RULES[rule].effect), rule, f"{count} place(s)", RULES[rule].fix) for rule, count in counts.items()]
    return told + [("warning", found.rule, found.where, found.why) for found in warnings]


def _plain(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Findings as JSON data, each with its effect on an engine build: refused, wrong, degraded or warning."""
    from exporters.tensorrt.lint import RULES

    return [{**dataclasses.asdict(found), "effect": str(RULES[found.rule].effect)} for found in findings]
