"""The gates that an artifact and the records beside it carry, where no run has judged them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fp8pipe.artifact.gate import read_gate
from fp8pipe.report.blocks import Block, Table, Text
from fp8pipe.report.figures import Badge, Figure, Form
from fp8pipe.report.subject import Item, Subject

__all__ = ["own_gates"]

_HEAD = ("gate", "verdict", "value", "against", "detail")


def own_gates(subject: Subject, item: Item) -> Iterator[Block]:
    """Tables of gates: the manifest's, then those of each record."""
    if item.artifact.manifest.gates:
        yield _table(subject, item.manifest, f"Gates of {item.name}.")
    else:
        yield Text([f"{item.name} carries no gates."])
    for record in item.records:
        told = Badge(str(subject.documents.get(record.file, "verdict")))
        if not record.current:
            yield Text([told, f" {record.file}, not used: {record.finding}."])
            continue
        yield Text([told, f" {record.file}"], f"Record of {record.kind}")
        if subject.documents.get(record.file, "gates"):
            yield _table(subject, record.file, f"Gates of {record.file}.")


def _table(subject: Subject, file: str, caption: str) -> Table:
    documents = subject.documents
    rows = []
    for index, plain in enumerate(documents.get(file, "gates")):
        gate = read_gate(plain)
        value, threshold = (documents.figure(file, "gates", index, k, form=Form.PLAIN) for k in ("value", "threshold"))
        verdict: Any = "holds" if gate.passed else Badge(str(gate.verdict))
        detail = documents.quote(file, "gates", index, "detail")
        name = documents.quote(file, "gates", index, "name")
        bound = [f"{gate.comparison} ", threshold or Figure(gate.threshold, f"{file}#/gates/{index}/threshold")]
        rows.append([name, verdict, value or "missing", bound, detail or "must be equal"])
    return Table(_HEAD, rows, caption, numeric=(2, 3))
