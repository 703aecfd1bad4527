"""Everything that a reader should not have to find out: fallbacks, findings, stale records, what was not measured."""

from __future__ import annotations

from typing import Any

from fp8pipe.report.blocks import Block, Section, Table, Text
from fp8pipe.report.subject import Subject

__all__ = ["section"]


def section(subject: Subject) -> Section:
    """The section."""
    rows: list[list[Any]] = []
    for item in subject.items:
        rows += [[item.name, warning] for warning in subject.documents.quotes(item.manifest, "warnings")]
        rows += [[item.name, f"{record.finding}; it was left out"] for record in item.records if not record.current]
        for record in (record for record in item.records if record.current):
            rows += [[record.file, text] for text in subject.documents.quotes(record.file, "reasons")]
    blocks: list[Block] = [Table(["from", "warning"], rows)] if rows else [Text(["There are none."])]
    return Section("warnings", "Warnings", "Fallbacks and findings that the stages recorded.", blocks)
