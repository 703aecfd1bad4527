"""One thing that is wrong with a planned export: which rule, which tensor, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fp8pipe.errors import LintRefusedError

__all__ = ["Finding", "LintFindingsError"]


@dataclass(frozen=True, slots=True)
class Finding:
    """A refused export's reason.

    Attributes:
        rule: stable identifier.
        tensor: the tensor, module, node or file concerned.
        why: what was seen, with values.
        fix: what the user can do.
    """

    rule: str
    tensor: str
    why: str
    fix: str

    def __str__(self) -> str:
        return f"[{self.rule}] {self.tensor}: {self.why}"


class LintFindingsError(LintRefusedError):
    """An export refused by the linter, with every finding.

    Args:
        findings: in the order found.
        source: what was linted.
        verb: what cannot be done with it.

    Attributes:
        findings: all of them, in the order found.
    """

    def __init__(self, findings: Sequence[Finding], source: str, verb: str = "exported") -> None:
        self.findings = tuple(findings)
        fixes = list(dict.fromkeys(f"{finding.rule}: {finding.fix}" for finding in findings))
        super().__init__(
            f"{source} cannot be {verb}: {len(findings)} finding(s), nothing was written",
            why="\n       ".join(str(finding) for finding in findings),
            fix="\n       ".join(fixes),
        )
