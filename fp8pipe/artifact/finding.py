"""Findings: the problems reported by the linters of exports and by the command `verify`.

If a linter has findings, the export is refused with a single error that contains all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from fp8pipe.core.errors import LintRefusedError

__all__ = ["Check", "Finding", "LintFindingsError", "refuse"]


class Check(StrEnum):
    """The checks of `verify`, the cheapest first."""

    CHECKSUM = "checksum"
    """A record is compared with its checksum."""
    SIGNATURE = "signature"
    """The files of a directory are compared with the signature next to it."""
    HASH = "hash"
    """The size and sha256 of a file are compared with the manifest."""
    RECORD = "record"
    """The record of a validation or run is checked for consistency, and compared with the artifacts it refers to."""
    PARENT = "parent"
    """The parents named in a manifest are compared with the artifacts that exist."""
    MANIFEST = "manifest"
    """Statements of a manifest are compared with the contents of the files."""
    LINT = "lint"
    """The rules of the linters on values and structure are applied."""
    REOPEN = "reopen"
    """Files are opened as an engine would open them, and checked for consistency with each other."""
    PARITY = "parity"
    """All weights and files are compared with those of the parent."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem that was found."""

    rule: str  # name of the linter's rule or of the check of `verify`; names do not change between versions
    where: str  # the tensor, module, node or file concerned
    why: str  # what was observed, with values
    fix: str = ""  # what the user can do; empty if that is the same for all findings
    artifact: str = ""  # directory of the artifact, or file of the record; empty if only one is checked

    @property
    def check(self) -> Check:
        """The check of `verify` that reported the finding; `Check.LINT` for all rules of linters."""
        return Check(self.rule) if self.rule in list(Check) else Check.LINT

    def __str__(self) -> str:
        return f"[{self.rule}] {self.where}: {self.why}"


_SHOWN = 4


class LintFindingsError(LintRefusedError):
    """The error with which an export is refused because of findings.

    Args:
        findings: all findings, in the order in which they were found.
        source: description of the checked model or artifact.
        verb: past participle of what cannot be done with it ("exported").
        note: a last line for the advice on how to fix the findings.

    Attributes:
        findings: all findings, in the order in which they were found.
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


def refuse(findings: Iterable[Finding], source: str) -> None:
    """Raise an error if there are findings for the export of `source`.

    Raises:
        LintFindingsError: there is at least one finding; the error contains all of them.
    """
    found = list(findings)
    if found:
        raise LintFindingsError(found, source)


def _shown(findings: Sequence[Finding]) -> list[str]:
    """The findings to show in the message: the first few of each rule, since one cause may affect a hundred nodes."""
    by_rule: dict[str, list[Finding]] = {}
    for finding in findings:
        by_rule.setdefault(finding.rule, []).append(finding)
    shown = []
    for rule, found in by_rule.items():
        shown += [str(finding) for finding in found[:_SHOWN]]
        if len(found) > _SHOWN:
            shown.append(f"[{rule}] and {len(found) - _SHOWN} more; --json lists all")
    return shown
