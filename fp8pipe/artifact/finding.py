"""The one type of a located fault: which rule, where, why, and what to do. Lint and verify both return these."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Check", "Finding"]


class Check(StrEnum):
    """The checks of `verify`, from the cheapest."""

    CHECKSUM = "checksum"
    """A record's bytes against its checksum."""
    SIGNATURE = "signature"
    """A directory's files against the signature beside it."""
    HASH = "hash"
    """A file's bytes against the manifest."""
    RECORD = "record"
    """What a validation or a run says, against the artifacts it speaks of and against itself."""
    PARENT = "parent"
    """The parents that a manifest names, against the artifacts that are there."""
    MANIFEST = "manifest"
    """What a manifest states, against the files."""
    LINT = "lint"
    """The linters' rules on values and structure."""
    REOPEN = "reopen"
    """Files read as an engine reads them: do they fit each other?"""
    PARITY = "parity"
    """Every number and file, against those of the parent."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault."""

    rule: str  # a linter's rule, or a check of `verify`; stable
    where: str  # the tensor, module, node or file concerned
    why: str  # what was seen, with values
    fix: str = ""  # what the user can do; empty where that is the same for all findings
    artifact: str = ""  # directory of the artifact, or the record's file; empty while only one is looked at

    @property
    def check(self) -> Check:
        """The check that saw it: the rule itself, or lint, whose rules have names of their own."""
        return Check(self.rule) if self.rule in list(Check) else Check.LINT

    def __str__(self) -> str:
        return f"[{self.rule}] {self.where}: {self.why}"
