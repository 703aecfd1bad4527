"""Verdicts of the run and its stages; every gate with its value, threshold and rationale; and warnings.

Gates defined in a recipe, and gates that fail, are always visible; the others are in collapsed tables, one per stage. A
report on a single artifact shows the gates of its manifest and of the records next to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fp8pipe.artifact.gate import Gate, Verdict, read_gate, worst
from fp8pipe.artifact.kinds import kind_named
from fp8pipe.artifact.runs import RUN_NAME, StageRecord
from fp8pipe.report.blocks import Block, Table, Text
from fp8pipe.report.figures import Badge, Derive, Figure, Form, Quote
from fp8pipe.report.subject import Item, Subject

NOT_VALIDATED = "NOT-VALIDATED"  # shown instead of a verdict if there is no validation
_MEANING: dict[str, str] = {
    NOT_VALIDATED: "No validation has judged this export, and nothing has run it: `fp8pipe validate` does.",
    Verdict.ACCEPT: "Every gate holds.",
    Verdict.PROVED_WITHOUT_RUNNING: "Files and graph hold what they must; its validation has not run the engine.",
    Verdict.CONSISTENT: "The engine computes what the files say; what they were made from was not compared.",
    Verdict.REGRESSION: "A measured figure is on the wrong side of its threshold.",
    Verdict.ANOMALOUS: "A figure is missing, or things that must be equal are not; nothing measured can be trusted.",
    Verdict.INFEASIBLE: "A stage cannot run on this machine, or its export was refused.",
}  # fmt: skip
_HEAD = ("gate", "verdict", "value", "threshold", "why this threshold")


def overall(subject: Subject) -> str:
    """The worst verdict of the run or of the artifact's gates, and of all records next to the artifacts.

    A single export without a validation record is `NOT_VALIDATED`, unless a gate or a record failed.
    """
    found, unvalidated = [] if subject.run is None else [subject.run.verdict], False
    for item in subject.items:
        found += [record.verdict for record in item.records]
        if subject.run is None:
            found += [gate.verdict for gate in item.artifact.manifest.gates]
            unvalidated |= bool(kind_named(item.kind).engines) and item.record("validation") is None
    verdict = worst(found)
    return NOT_VALIDATED if unvalidated and not verdict.failed else str(verdict)


def verdicts(subject: Subject) -> Iterator[Block]:
    """The overall verdict, the stages of the run, and every gate."""
    verdict = overall(subject)
    yield Text([Badge(verdict), f" {_MEANING[verdict]}"], tone="verdict")
    if subject.run is not None:
        yield _stages(subject, subject.run.stages)
        yield from _gates(subject.run.stages)
    else:
        for item in subject.items:
            yield from _own_gates(subject, item)


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


def _gates(stages: list[StageRecord]) -> Iterator[Block]:
    for number, stage in enumerate(stages):
        if stage.error is not None:
            told = [
                [key, Quote(str(stage.error[key]), f"{RUN_NAME}#/stages/{number}/error/{key}")]
                for key in ("what", "why", "fix")
                if stage.error.get(key)
            ]
            yield Table([f"{stage.name} failed", "what the command said"], told)
    placed = [(number, index, stage, gate) for number, stage in enumerate(stages)
              for index, gate in enumerate(stage.gates)]  # fmt: skip
    failed = [entry for entry in placed if entry[3].verdict is not Verdict.ACCEPT]
    asked = [entry for entry in placed if entry not in failed and not _carried(entry[3])]
    for caption, entries in (("Gates that fail.", failed), ("Gates of the recipe that hold.", asked)):
        if entries:
            rows = [[stage.name, *_gate(number, index, gate)] for number, index, stage, gate in entries]
            yield Table(["stage", *_HEAD], rows, caption, numeric=(3, 4))
    for number, stage in enumerate(stages):
        own = [x for x in placed if x[2] is stage and x[3].verdict is Verdict.ACCEPT and _carried(x[3])]
        if own:
            rows = [_gate(number, index, gate) for _, index, _, gate in own]
            caption = f"Gates that {stage.name} carries and that hold: {len(own)}"
            yield Table(_HEAD, rows, caption, numeric=(2, 3), folded=True)


def _carried(gate: Gate) -> bool:
    """Whether the gate comes from the stage's own output; otherwise the recipe requested it."""
    _, _, inside = gate.source.partition("#")
    return inside.startswith("gates.") or inside == "verdict"


def _gate(number: int, index: int, gate: Gate) -> list[Any]:
    place = f"{RUN_NAME}#/stages/{number}/gates/{index}"
    value: Any = "missing" if gate.value is None else Figure(gate.value, f"{place}/value")
    bound = [f"{gate.comparison} ", Figure(gate.threshold, f"{place}/threshold")]
    verdict: Any = "holds" if gate.verdict is Verdict.ACCEPT else Badge(str(gate.verdict))
    reason: Any = Quote(gate.detail, f"{place}/detail") if gate.detail else "must hold exactly"
    return [Quote(gate.name, f"{place}/name"), verdict, value, bound, reason]


def _own_gates(subject: Subject, item: Item) -> Iterator[Block]:
    """Tables of gates: the manifest's, then those of each record."""
    if item.artifact.manifest.gates:
        yield _own_table(subject, item.manifest, f"Gates of {item.name}.")
    else:
        yield Text([f"{item.name} carries no gates."])
    for record in item.records:
        told = Badge(str(subject.documents.get(record.file, "verdict")))
        if not record.current:
            yield Text([told, f" {record.file}, not used: {record.finding}."])
            continue
        yield Text([told, f" {record.file}"], f"Record of {record.kind}")
        if subject.documents.get(record.file, "gates"):
            yield _own_table(subject, record.file, f"Gates of {record.file}.")


def _own_table(subject: Subject, file: str, caption: str) -> Table:
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
    return Table(("gate", "verdict", "value", "against", "detail"), rows, caption, numeric=(2, 3))


def warnings(subject: Subject) -> Iterator[Block]:
    """Warnings of the manifests, records that do not apply to the current export, and reasons for rejections."""
    rows: list[list[Any]] = []
    for item in subject.items:
        rows += [[item.name, warning] for warning in subject.documents.quotes(item.manifest, "warnings")]
        rows += [[item.name, f"{record.finding}; it was left out"] for record in item.records if not record.current]
        for record in (record for record in item.records if record.current):
            rows += [[record.file, text] for text in subject.documents.quotes(record.file, "reasons")]
    yield Table(["from", "warning"], rows) if rows else Text(["There are none."])
