"""Latency and size against full precision: the records of benchmarks, of service checks, and of engines that ran."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fp8pipe.artifact.kinds import kind_named
from fp8pipe.report.blocks import Block, Lines, Missing, Section, Table
from fp8pipe.report.figures import Derive, Figure, Form
from fp8pipe.report.subject import Item, Record, Subject

__all__ = ["section"]

_TITLES = {"bench": "speed and size", "serve-check": "through its service"}


def section(subject: Subject) -> Section:
    """The section."""
    blocks: list[Block] = []
    if subject.items:
        blocks.append(_sizes(subject))
    for item in subject.exports():
        for kind, title in _TITLES.items():
            record = item.record(kind)
            if record is not None:
                blocks += list(_rows(subject, item, record, title))
            elif kind in kind_named(item.kind).measured_by:
                blocks.append(Missing(f"{item.name}: {_absent(kind)}", f"fp8pipe {kind} {subject.where(item)}"))
        blocks += list(_timings(subject, item))
    if not subject.exports():
        blocks.append(Missing("There is no export to measure.", "fp8pipe export, then fp8pipe bench"))
    return Section("speed", "Speed and size", "Measured beside full precision, on the machine named with it.", blocks)


def _absent(kind: str) -> str:
    return "its speed was not measured." if kind == "bench" else "its service was not started and asked."


def _sizes(subject: Subject) -> Table:
    rows = []
    for item in subject.items:
        size = subject.documents.derived(Derive.SUM, item.manifest, "files", "*", "size", form=Form.BYTES)
        files = subject.documents.derived(Derive.COUNT, item.manifest, "files")
        rows.append([item.name, item.kind, files, size])
    return Table(["artifact", "kind", "files", "size"], rows, "On disk, all files.", (2, 3))


def _rows(subject: Subject, item: Item, record: Record, title: str) -> Iterator[Block]:
    documents = subject.documents
    listed: list[dict[str, Any]] = documents.get(record.file, "rows") or []
    rows = []
    for index, row in enumerate(listed):
        figure = documents.figure(record.file, "rows", index, "value")
        if figure is not None:
            what, how = (documents.quote(record.file, "rows", index, key) for key in ("what", "detail"))
            rows.append([what, _with_unit(figure, row.get("unit", "")), how or "as measured"])
    machine = documents.get(record.file, "machine") or {}
    where = f"{machine.get('processor', 'unknown processor')}, {machine.get('cores', 'unknown')} cores"
    caption = f"{item.name}, {title}: {where}, {str(documents.get(record.file, 'date') or '')[:10]}."
    yield Table(["measured", "value", "how"], rows, caption, (1,))
    missing = documents.quotes(record.file, "not_measured")
    if missing:
        yield Lines("Not measured:", missing)


def _with_unit(figure: Figure, unit: str) -> Figure:
    if unit == "bytes":
        return Figure(figure.value, figure.source, Form.BYTES)
    return Figure(figure.value, figure.source, figure.form, unit=unit)


def _timings(subject: Subject, item: Item) -> Iterator[Block]:
    record = item.record("validation")
    if record is None:
        return
    timings = subject.documents.get(record.file, "execution", "timings") or []
    rows = [
        [
            *(
                subject.documents.figure(record.file, "execution", "timings", index, key)
                for key in ("batch", "engine_ms", "fp16_ms")
            )
        ]
        for index in range(len(timings))
    ]
    if rows:
        device = subject.documents.get(record.file, "execution", "device")
        yield Table(["images at once", "engine, ms", "FP16, ms"], rows, f"{item.name}: on {device}.", (0, 1, 2))
