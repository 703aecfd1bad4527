"""Verdicts first: of the run, of its stages, and every gate with its value, its threshold and the reason for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fp8pipe.report.blocks import Block, Section, Table, Text
from fp8pipe.report.figures import Badge, Derive, Figure, Form
from fp8pipe.report.subject import Item, Subject
from fp8pipe.runs import RUN_NAME, GateOutcome, StageRecord, Verdict, worst

__all__ = ["overall", "section"]

_MEANING = {
    Verdict.ACCEPT: "every gate holds",
    Verdict.REGRESSION: "a measured figure is on the wrong side of its threshold",
    Verdict.ANOMALOUS: "a figure is missing, or two things that must be equal are not; nothing measured here can be trusted",
    Verdict.INFEASIBLE: "a stage cannot run on this machine, or its export was refused",
}  # fmt: skip


def overall(subject: Subject) -> Verdict:
    """The worst verdict of the subject: of its stages, or of the artifact's own gates and records."""
    if subject.run is not None:
        return subject.run.verdict
    found = []
    for item in subject.items:
        found += [Verdict.ACCEPT if gate.passed else Verdict(gate.failure) for gate in item.artifact.manifest.gates]
        told = (subject.documents.get(record.file, "verdict") for record in item.records if record.current)
        found += [Verdict.ANOMALOUS for verdict in told if verdict == "REJECT"]
    return worst(found)


def section(subject: Subject) -> Section:
    """The section."""
    verdict = overall(subject)
    blocks: list[Block] = [Text([Badge(str(verdict)), f" {_MEANING[verdict]}."], tone="verdict")]
    if subject.run is not None:
        blocks.append(_stages(subject, subject.run.stages))
        for number, stage in enumerate(subject.run.stages):
            blocks += _stage(number, stage)
    else:
        for item in subject.items:
            blocks += list(_own(subject, item))
    return Section("verdicts", "Verdicts", "What was asked of this work, and whether it holds.", blocks)


def _stages(subject: Subject, stages: list[StageRecord]) -> Table:
    documents = subject.documents
    rows = []
    for number, stage in enumerate(stages):
        seconds = documents.figure(RUN_NAME, "stages", number, "seconds", form=Form.SECONDS)
        peak = documents.figure(RUN_NAME, "stages", number, "peak_rss_bytes", form=Form.BYTES)
        gates = documents.derived(Derive.COUNT, RUN_NAME, "stages", number, "gates")
        shown = "not recorded" if peak is None or not peak.value else peak
        rows.append([stage.name, stage.command, Badge(str(stage.verdict)), gates, seconds, shown])
    head = ["stage", "command", "verdict", "gates", "time", "peak memory"]
    return Table(head, rows, "Stages, in the order in which they ran.", numeric=(3, 4, 5))


def _stage(number: int, stage: StageRecord) -> Iterator[Block]:
    if stage.error is not None:
        words = (str(stage.error.get(key) or "") for key in ("what", "why", "fix"))
        yield Text([". ".join(word.strip().rstrip(".") for word in words if word) + "."], f"{stage.name} failed", "bad")
    if stage.gates:
        head = ["gate", "verdict", "value", "threshold", "reason"]
        rows = [_gate(number, index, gate) for index, gate in enumerate(stage.gates)]
        yield Table(head, rows, f"Gates of {stage.name}.", numeric=(2, 3))


def _gate(number: int, index: int, gate: GateOutcome) -> list[Any]:
    place = f"{RUN_NAME}#/stages/{number}/gates/{index}"
    value: Any = "missing" if gate.value is None else Figure(gate.value, f"{place}/value")
    bound: list[Any] = []
    if gate.at_least is not None:
        bound += ["≥ ", Figure(gate.at_least, f"{place}/at_least")]
    if gate.at_most is not None:
        bound += [" and ≤ " if bound else "≤ ", Figure(gate.at_most, f"{place}/at_most")]
    return [gate.name, Badge(str(gate.verdict)), value, bound or "a number", gate.reason or "must hold exactly"]


def _own(subject: Subject, item: Item) -> Iterator[Block]:
    """The gates that an artifact and its records carry."""
    gates = item.artifact.manifest.gates
    if gates:
        rows = [_row(subject, item.manifest, index, gate.model_dump()) for index, gate in enumerate(gates)]
        yield Table(["gate", "verdict", "value", "against", "detail"], rows, f"Gates of {item.name}.", numeric=(2, 3))
    else:
        yield Text([f"{item.name} carries no gates."])
    for record in item.records:
        told = subject.documents.get(record.file, "verdict")
        yield Text(
            [Badge(str(told)), f" {record.file}" if record.current else f" {record.file}, of another manifest: it says nothing about this one"],
            f"Record of {record.kind}",
        )  # fmt: skip
        listed = subject.documents.get(record.file, "gates") or []
        if record.current and listed:
            rows = [_row(subject, record.file, index, gate) for index, gate in enumerate(listed)]
            head = ["gate", "verdict", "value", "against", "detail"]
            yield Table(head, rows, f"Gates of {record.file}.", numeric=(2, 3))


def _row(subject: Subject, file: str, index: int, gate: dict[str, Any]) -> list[Any]:
    value = subject.documents.figure(file, "gates", index, "value")
    threshold = subject.documents.figure(file, "gates", index, "threshold")
    verdict = "PASSED" if gate["passed"] else gate.get("failure", "FAILED")
    return [gate["name"], Badge(verdict), value or "missing", threshold or "missing", gate.get("detail") or "equal"]
