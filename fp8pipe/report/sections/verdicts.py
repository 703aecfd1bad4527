"""Verdicts first: of the run, of its stages, and every gate with its value, its threshold and the reason for it.

Gates that a recipe asked for, and gates that fail, are in plain sight; the others are folded, a list a stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fp8pipe.artifact.gate import Gate, Verdict, worst
from fp8pipe.artifact.kinds import kind_named
from fp8pipe.artifact.runs import RUN_NAME, StageRecord
from fp8pipe.report.blocks import Block, Section, Table, Text
from fp8pipe.report.figures import Badge, Derive, Figure, Form, Quote
from fp8pipe.report.sections.own_gates import own_gates
from fp8pipe.report.subject import Subject

__all__ = ["overall", "section"]

_MEANING = {
    Verdict.ACCEPT: "Every gate holds.",
    Verdict.PROVED_WITHOUT_RUNNING: "Files and graph hold what they must; no validation has run the engine.",
    Verdict.CONSISTENT: "The engine computes what the files say; what they were made from was not compared.",
    Verdict.REGRESSION: "A measured figure is on the wrong side of its threshold.",
    Verdict.ANOMALOUS: "A figure is missing, or things that must be equal are not; nothing measured can be trusted.",
    Verdict.INFEASIBLE: "A stage cannot run on this machine, or its export was refused.",
}  # fmt: skip
_HEAD = ("gate", "verdict", "value", "threshold", "why this threshold")


def overall(subject: Subject) -> Verdict:
    """The worst verdict of the subject: of its stages, of the artifact's own gates, and of the records.

    An export that stands alone without a validation is not accepted: nothing has run it.
    """
    found = [] if subject.run is None else [subject.run.verdict]
    for item in subject.items:
        found += [record.verdict for record in item.records]
        if subject.run is None:
            found += [gate.verdict for gate in item.artifact.manifest.gates]
            unproved = kind_named(item.kind).engines and item.record("validation") is None
            found += [Verdict.PROVED_WITHOUT_RUNNING] if unproved else []
    return worst(found)


def section(subject: Subject) -> Section:
    """The section."""
    verdict = overall(subject)
    blocks: list[Block] = [Text([Badge(str(verdict)), f" {_MEANING[verdict]}"], tone="verdict")]
    if subject.run is not None:
        blocks.append(_stages(subject, subject.run.stages))
        blocks += list(_gates(subject.run.stages))
    else:
        for item in subject.items:
            blocks += list(own_gates(subject, item))
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
    """Whether the stage's own output carries the gate; else the recipe asks for it."""
    _, _, inside = gate.source.partition("#")
    return inside.startswith("gates.") or inside == "verdict"


def _gate(number: int, index: int, gate: Gate) -> list[Any]:
    place = f"{RUN_NAME}#/stages/{number}/gates/{index}"
    value: Any = "missing" if gate.value is None else Figure(gate.value, f"{place}/value")
    bound = [f"{gate.comparison} ", Figure(gate.threshold, f"{place}/threshold")]
    verdict: Any = "holds" if gate.verdict is Verdict.ACCEPT else Badge(str(gate.verdict))
    reason: Any = Quote(gate.detail, f"{place}/detail") if gate.detail else "must hold exactly"
    return [Quote(gate.name, f"{place}/name"), verdict, value, bound, reason]
