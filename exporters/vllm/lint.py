"""The gate before writing: every rule runs, every finding is kept, and one error carries them all."""

from __future__ import annotations

from collections.abc import Callable

from exporters.graph.findings import LintFindingsError
from exporters.vllm.lint_structure import lint_structure
from exporters.vllm.lint_values import lint_values
from exporters.vllm.plan import ExportPlan
from fp8pipe.artifact.finding import Finding

__all__ = ["Finding", "LintFindingsError", "lint", "refuse"]


def lint(plan: ExportPlan, advance: Callable[[], None] = lambda: None) -> list[Finding]:
    """Run every rule; reads the source once.

    Args:
        plan: the planned export.
        advance: called once a tensor, for progress.

    Returns:
        All findings, those of structure first.
    """
    return lint_structure(plan) + lint_values(plan, advance)


def refuse(findings: list[Finding], plan: ExportPlan) -> None:
    """Raise when there is any finding.

    Raises:
        LintFindingsError: with all of them.
    """
    if findings:
        raise LintFindingsError(findings, str(plan.source.root))
