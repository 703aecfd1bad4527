"""Training: curves from metrics.jsonl, and statistics of the final merge by layer."""

from __future__ import annotations

from collections.abc import Iterator

from fp8pipe.artifact.kinds import FALQON_KIND, LORA_KIND, TUNED_KINDS, VIT_KIND
from fp8pipe.report.blocks import Block, Drawing, Drawings, Missing, Table, Text
from fp8pipe.report.charts import Point, Series, grid, line_chart
from fp8pipe.report.figures import Figure, Form
from fp8pipe.report.subject import Item, Subject

METRICS = "metrics.jsonl"
_HEALTH = {
    "saturated": "saturation: share of targets beyond the largest code (448); more than a trace means clipping",
    "changed": "codes that the update changes; near 0 the update would vanish",
    "norm_ratio": "survival: size of the change applied over the change intended",
    "cosine": "direction of the change applied against the one intended",
}

_KEY = "final_merge_layers"
_SHOWN = (
    ("saturated", Form.PERCENT, "Saturation: share of targets beyond the largest code."),
    ("norm_ratio", Form.RATIO, "Survival in size: change applied over change intended; compensation may exceed 1."),
    ("cosine", Form.RATIO, "Survival in direction: cosine of the change applied and the change intended."),
    ("changed", Form.PERCENT, "Codes that changed."),
)


def training(subject: Subject) -> Iterator[Block]:
    """Loss curves and update statistics over steps, for each trained artifact."""
    for item in subject.of_kind(*TUNED_KINDS, VIT_KIND):
        yield from _curves(subject, item)


def _curves(subject: Subject, item: Item) -> Iterator[Block]:
    if not item.has(METRICS):
        yield Text(["Nothing was trained: metrics.jsonl is empty. Ranges and rounding alone."], item.name)
        return
    yield Text([_what(item)], item.name)
    loss = _series(subject, item, "loss", "training")
    heldout = _series(subject, item, "heldout_loss", "held out", dashed=True)
    curves = [curve for curve in (loss, heldout) if curve is not None]
    drawings = []
    if curves:
        svg = line_chart(curves, f"loss of {item.name}")
        drawings.append(Drawing(svg, [f"Loss against optimizer steps, {_unit(item)}."]))
    for key, meaning in _HEALTH.items():
        for prefix, when in (("flush", "flushed at each step"), ("pending", "if it were rounded now")):
            found = _series(subject, item, f"{prefix}_{key}", f"{key.replace('_', ' ')}, {when}")
            if found is not None:
                svg = line_chart([found], f"{key} of {item.name}", low=0.0)
                drawings.append(Drawing(svg, [meaning[0].upper() + meaning[1:] + "."]))
    yield Drawings(drawings)
    if item.kind == FALQON_KIND and len(drawings) < 2:
        yield Missing("The health of the update was not logged.", "fp8pipe finetune, with a smaller log_every")
    if item.kind == LORA_KIND:
        yield Text(["LoRA keeps its update in higher precision, so saturation and survival have no meaning."])
    if item.kind == VIT_KIND:
        yield Text(["Held-out loss, saturation and survival of updates are not logged while a ViT is distilled."])


def _what(item: Item) -> str:
    if item.kind == VIT_KIND:
        return "Distillation of the low-bit model from its original."
    return f"Fine-tuning with {item.artifact.manifest.config.get('method', 'an unnamed method')}."


def _unit(item: Item) -> str:
    return "distance from the teacher" if item.kind == VIT_KIND else "nats per answer token"


def _series(subject: Subject, item: Item, key: str, label: str, dashed: bool = False) -> Series | None:
    file = item.file(METRICS)
    lines = subject.documents.get(file) or []
    points = []
    for index, line in enumerate(lines):
        figure = subject.documents.figure(file, index, key, form=Form.LOSS) if key in line else None
        if figure is not None and "step" in line and figure.value == figure.value:
            points.append(Point(float(line["step"]), figure))
    return Series(label, points, dashed) if points else None


def by_layer(subject: Subject) -> Iterator[Block]:
    """Saturation, and the share of the update that survives rounding, for each layer at the final merge."""
    for item in subject.of_kind(FALQON_KIND):
        yield from _layers(subject, item)
    others = sorted({item.kind for item in subject.of_kind(LORA_KIND, VIT_KIND)})
    if others:
        shown = " and ".join(others)
        yield Text([f"Artifacts of kind {shown} have no flush: their weights are rounded once, not updated in FP8."])


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
