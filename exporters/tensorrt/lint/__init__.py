"""Finds what TensorRT would refuse, compute incorrectly or build inefficiently in any Q/DQ graph, before a build.

The builder stops at the first thing it does not support, with a message about its own internals, and silently accepts
much that it then multiplies in half precision. Here all findings are reported at once, with the rule, the node and the
fix. Graphs need not come from this project: nothing is identified by name. Only the main graph is read, not the bodies
of If or Loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from exporters.tensorrt.lint.products import lint_attention, lint_operands
from exporters.tensorrt.lint.rules import RULES, Effect, Report, Rule
from exporters.tensorrt.lint.values import lint_machines, lint_scales, lint_values
from exporters.tensorrt.lint.view import View
from fp8pipe.artifact.finding import LintFindingsError
from fp8pipe.core.errors import BadArtifactError

__all__ = ["RULES", "Effect", "Report", "Rule", "check_file", "lint_file", "lint_typed"]


def lint_typed(model: ir.Model, capabilities: Sequence[str] = ()) -> Report:
    """Check a graph that will be built as a strongly typed network.

    `capabilities` are the compute capabilities to build for, such as "8.9"; without them, types are not checked against
    what GPUs support.
    """
    view = View(model)
    findings = [
        *lint_values(view),
        *lint_scales(view),
        *lint_operands(view),
        *lint_attention(view),
        *lint_machines(view, capabilities),
    ]
    return Report(tuple(dict.fromkeys(findings)))


def lint_file(path: Path, capabilities: Sequence[str] = ()) -> Report:
    """Check an ONNX file as `lint_typed` does; tensors in external data files are read when they are needed.

    Raises:
        BadArtifactError: the file does not exist, or cannot be read as ONNX.
    """
    if not path.is_file():
        raise BadArtifactError(
            f"{path} is not an ONNX file",
            why="it is a directory" if path.is_dir() else "the file does not exist",
            fix="name the .onnx file itself" + (f": {path / 'model.onnx'}" if (path / "model.onnx").is_file() else ""),
        )
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf's own error type is not public
        raise BadArtifactError(
            f"{path} cannot be read as an ONNX graph",
            why=f"{type(error).__name__}: {error}"[:300],
            fix="name an ONNX file; if this is one, it is damaged: export it again",
        ) from error
    return lint_typed(model, capabilities)


def check_file(path: Path, capabilities: Sequence[str], source: str, *, require: bool) -> tuple[str, ...]:
    """Check an ONNX file before a builder is called, and refuse it if there are errors.

    Args:
        path: the file.
        capabilities: compute capabilities to build for.
        source: name of the export's source, for the error message.
        require: whether findings that only change the precision are errors, too.

    Returns:
        One sentence for each rule that has warnings.

    Raises:
        LintFindingsError: the file has errors; the exception holds all of them.
        BadArtifactError: the file cannot be read.
    """
    report = lint_file(path, capabilities)
    errors = report.errors(require=require)
    if errors:
        raise LintFindingsError(errors, source, note=report.waivable(require=require))
    return report.summary(require=require)
