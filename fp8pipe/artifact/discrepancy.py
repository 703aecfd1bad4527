"""One thing in which files differ from what they should be: where, what is wrong, and which check saw it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Catcher", "Discrepancy"]


class Catcher(StrEnum):
    """The checks, from the cheapest."""

    SEAL = "seal"
    """A record's bytes against its seal."""
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
class Discrepancy:
    """One finding.

    Attributes:
        catcher: the check that saw it.
        where: the file, layer, tensor or node concerned.
        why: what is wrong, with values.
        artifact: directory of the artifact, or the record's file.
    """

    catcher: Catcher
    where: str
    why: str
    artifact: str = ""

    def __str__(self) -> str:
        return f"[{self.catcher}] {self.where}: {self.why}"
