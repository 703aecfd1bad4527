"""Parity: does the engine compute what was made? By layer, from the records of validations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fp8pipe.artifact.kinds import kind_named
from fp8pipe.report.blocks import Block, Drawing, Drawings, Lines, Missing, Section, Table, Text
from fp8pipe.report.charts import grid
from fp8pipe.report.figures import Badge, Derive, Form
from fp8pipe.report.subject import Record, Subject

__all__ = ["section"]


def section(subject: Subject) -> Section:
    """The section."""
    blocks: list[Block] = []
    for item in subject.exports():
        record = item.record("validation")
        if record is None:
            unused = next((r.finding for r in item.records if r.kind == "validation"), "")
            what = f"{unused}." if unused else "it was not validated."
            command = f"fp8pipe validate {subject.where(item)}"
            if not kind_named(item.kind).engines:
                what, command = "no engine here reads this layout, so its arithmetic is not proved.", ""
            blocks.append(Missing(f"{item.name}: {what}", command))
            continue
        told = subject.documents.get(record.file, "verdict")
        engine = subject.documents.get(record.file, "engine")
        blocks.append(Text([Badge(str(told)), f" in {engine}"], item.name))
        blocks += list(_layers(subject, record))
        blocks += list(_inside_vllm(subject, record))
        blocks += list(_proofs(subject, record))
    if not blocks:
        command = "fp8pipe export, then fp8pipe validate"
        blocks.append(Missing("There is no export, so there is no engine to compare with.", command))
    return Section("parity", "Parity with the engine", "The engine's results beside the artifact's.", blocks)


def _layers(subject: Subject, record: Record) -> Iterator[Block]:
    layers: list[dict[str, Any]] = subject.documents.get(record.file, "layers") or []
    if not layers:
        return
    documents = subject.documents
    count = documents.derived(Derive.COUNT, record.file, "layers")
    codes = documents.derived(Derive.SUM, record.file, "layers", "*", "codes")
    differing = documents.derived(Derive.SUM, record.file, "layers", "*", "differing_codes")
    integer = documents.derived(Derive.SUM, record.file, "layers", "*", "integer")
    compared = [differing, " of ", codes, " activation codes differ in ", count, " products; "]
    yield Text([*compared, integer, " run on integers."])
    cells = []
    for index, layer in enumerate(layers):
        figure = documents.figure(record.file, "layers", index, "error")
        if figure is not None:
            cells.append((layer["layer"], figure))
    if cells:
        worst = max(cells, key=lambda cell: cell[1].value)
        caption = [
            "Error of each product in the engine against the exact result of its codes, over its largest output; each "
            "is fed the same input on both sides. Largest: ", worst[1], f" in {worst[0]}.",
        ]  # fmt: skip
        yield Drawings([Drawing(grid(cells, "error by layer"), caption)])
    rows = [
        [layer["layer"], *(documents.figure(record.file, "layers", index, key) for key in ("error", "torch_error")),
         documents.figure(record.file, "layers", index, "differing_codes", form=Form.COUNT)]
        for index, layer in enumerate(layers)
    ]  # fmt: skip
    head = ["product", "engine", "torch", "codes differing"]
    yield Table(head, rows, "The figures.", (1, 2, 3), folded=True, printed=False)


def _inside_vllm(subject: Subject, record: Record) -> Iterator[Block]:
    documents = subject.documents
    if documents.get(record.file, "weights") is None:
        return
    served = documents.get(record.file, "served") is not None
    rows: list[list[Any]] = [
        [what, documents.figure(record.file, *place, form=form)]
        for what, place, form in (
            ("weights read back from inside the engine", ("weights", "elements"), Form.COUNT),
            ("tensors they belong to", ("weights", "tensors"), Form.COUNT),
            ("layers stored as FP8 codes", ("weights", "layers"), Form.COUNT),
            ("weights whose bits differ", ("weights", "differing"), Form.COUNT),
            ("FP8 codes that differ", ("weights", "differing_codes"), Form.COUNT),
            ("largest difference of log-probabilities, nats", ("logprobs", "max_abs_diff"), Form.PLAIN),
            ("accepted, nats", ("logprobs", "threshold"), Form.PLAIN),
            ("tokens scored", ("logprobs", "tokens"), Form.COUNT),
            ("as served: weights whose bits differ", ("served", "weights", "differing"), Form.COUNT),
            ("as served: divergence from fp32, nats a token", ("served", "engine_kl"), Form.PLAIN),
            ("as served: noise of the form in torch, nats a token", ("served", "noise_kl"), Form.PLAIN),
            ("as served: accepted, nats a token", ("served", "bound_kl"), Form.PLAIN),
            ("as served: first choices that agree with fp32, part of all", ("served", "agreement"), Form.PLAIN),
        )
        if served or place[0] != "served"
    ]
    yield Table(["compared", "value"], rows, "Weights and arithmetic inside the engine.", (1,))


def _proofs(subject: Subject, record: Record) -> Iterator[Block]:
    for key, title in (("proved", "What holds:"), ("not_proved", "What was not tried, and why:")):
        lines = subject.documents.quotes(record.file, key)
        if lines:
            yield Lines(title, lines)
