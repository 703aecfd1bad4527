"""A linter refuses an export: one error that carries every finding."""

from __future__ import annotations

from collections.abc import Sequence

from fp8pipe.artifact.finding import Finding
from fp8pipe.core.errors import LintRefusedError

__all__ = ["LintFindingsError"]

_SHOWN = 4


class LintFindingsError(LintRefusedError):
    """An export refused by the linter, with every finding.

    Args:
        findings: in the order found.
        source: what was linted.
        verb: what cannot be done with it.
        note: a last line of what to do.

    Attributes:
        findings: all of them, in the order found.
    """

    def __init__(self, findings: Sequence[Finding], source: str, verb: str = "exported", note: str = "") -> None:
        self.findings = tuple(findings)
        fixes = list(dict.fromkeys(f"{finding.rule}: {finding.fix}" for finding in findings))
        written = ", nothing was written" if verb == "exported" else ""
        super().__init__(
            f"{source} cannot be {verb}: {len(findings)} finding(s){written}",
            why="\n       ".join(_shown(findings)),
            fix="\n       ".join([*fixes, *([note] if note else [])]),
        )


def _shown(findings: Sequence[Finding]) -> list[str]:
    """The first few of each rule: one shared zero point can be a finding at a hundred nodes."""
    by_rule: dict[str, list[Finding]] = {}
    for finding in findings:
        by_rule.setdefault(finding.rule, []).append(finding)
    shown = []
    for rule, found in by_rule.items():
        shown += [str(finding) for finding in found[:_SHOWN]]
        if len(found) > _SHOWN:
            shown.append(f"[{rule}] and {len(found) - _SHOWN} more; --json lists all")
    return shown
