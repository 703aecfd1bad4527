"""`fp8pipe lint`: what TensorRT would refuse, compute wrongly or build slowly in a Q/DQ graph, without a builder."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fp8pipe.cli.common import Console, common_options, table

if TYPE_CHECKING:
    from fp8pipe.artifact.finding import Finding


def _capabilities(ctx: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    for text in value:
        if not re.fullmatch(r"\d+\.\d+", text):
            raise click.BadParameter(f"{text!r} is not a compute capability; write for instance 8.9", ctx, param)
    return value


@click.command("lint")
@click.argument("graph", type=click.Path(path_type=Path))
@click.option(
    "--compute-capability",
    "capabilities",
    multiple=True,
    callback=_capabilities,
    help="GPUs to compile for, for instance 8.9; without any, no type is judged by them.",
)
@click.option("--no-require", is_flag=True, help="Accept what is only multiplied in another precision.")
@common_options()
def command(graph: Path, capabilities: tuple[str, ...], no_require: bool, console: Console) -> None:
    """Lint the ONNX file GRAPH, from any source; all findings at once, exit 13 when one is an error."""
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
    """How many errors of each rule and what they do to an engine; every warning."""
    from exporters.tensorrt.lint import RULES

    counts = Counter(found.rule for found in errors)
    told = [(str(RULES[rule].effect), rule, f"{count} place(s)", RULES[rule].fix) for rule, count in counts.items()]
    return told + [("warning", found.rule, found.where, found.why) for found in warnings]


def _plain(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """With what the builder does: refused, wrong, degraded or warning."""
    from exporters.tensorrt.lint import RULES

    return [{**dataclasses.asdict(found), "effect": str(RULES[found.rule].effect)} for found in findings]
