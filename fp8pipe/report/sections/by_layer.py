"""Saturation and survival of the update by layer, at the last flush."""

from __future__ import annotations

from collections.abc import Iterator

from fp8pipe.artifact.kinds import FALQON_KIND, LORA_KIND, VIT_KIND
from fp8pipe.report.blocks import Block, Drawing, Drawings, Missing, Section, Table, Text
from fp8pipe.report.charts import grid
from fp8pipe.report.figures import Figure, Form
from fp8pipe.report.subject import Item, Subject

__all__ = ["section"]

_KEY = "final_merge_layers"
_SHOWN = (
    ("saturated", Form.PERCENT, "Saturation: share of targets beyond the largest code."),
    ("norm_ratio", Form.RATIO, "Survival in size: change applied over change intended; compensation may exceed 1."),
    ("cosine", Form.RATIO, "Survival in direction: cosine of the change applied and the change intended."),
    ("changed", Form.PERCENT, "Codes that changed."),
)


def section(subject: Subject) -> Section:
    """The section."""
    blocks: list[Block] = []
    for item in subject.of_kind(FALQON_KIND):
        blocks += list(_layers(subject, item))
    others = sorted({item.kind for item in subject.of_kind(LORA_KIND, VIT_KIND)})
    if others:
        shown = " and ".join(others)
        text = f"Artifacts of kind {shown} have no flush: their weights are rounded once, not updated in FP8."
        blocks.append(Text([text]))
    if not blocks:
        blocks.append(Missing("No artifact that was tuned in FP8 is here.", "fp8pipe finetune"))
    lead = (
        "What the last flush did to each layer; a column is a block of the model, "
        "the strongest square the largest value."
    )
    return Section("layers", "The update, layer by layer", lead, blocks)


def _layers(subject: Subject, item: Item) -> Iterator[Block]:
    names = subject.documents.get(item.manifest, "details", _KEY)
    if not names:
        what = f"{item.name} holds no figures by layer: it was written before they were kept."
        yield Missing(what, "fp8pipe finetune, with the configuration below")
        return
    drawings = []
    for key, form, caption in _SHOWN:
        cells = _cells(subject, item, names, key, form)
        if not cells:
            continue
        largest = max(cells, key=lambda cell: abs(cell[1].value))
        strongest = [" Largest: ", largest[1], f" in {largest[0]}."] if largest[1].value else [" Zero in every layer."]
        drawings.append(Drawing(grid(cells, f"{key} by layer of {item.name}"), [caption, *strongest]))
    yield Text([f"{len(names)} layers. Layers that read one input (q, k, v; gate, up) are one layer here."], item.name)
    yield Drawings(drawings)
    documents, place = subject.documents, (item.manifest, "details", _KEY)
    rows = [[name, *(documents.figure(*place, name, key, form=form) for key, form, _ in _SHOWN)] for name in names]
    head = ["layer", "saturated", "norm ratio", "cosine", "changed"]
    yield Table(head, rows, "The figures.", numeric=(1, 2, 3, 4), folded=True, printed=False)


def _cells(subject: Subject, item: Item, names: dict[str, object], key: str, form: Form) -> list[tuple[str, Figure]]:
    found = ((n, subject.documents.figure(item.manifest, "details", _KEY, n, key, form=form)) for n in names)
    return [(name, figure) for name, figure in found if figure is not None]
