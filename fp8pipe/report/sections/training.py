"""Loss and health while training: curves of metrics.jsonl, and what the deployed weights have of it."""

from __future__ import annotations

from collections.abc import Iterator

from fp8pipe.artifact.kinds import FALQON_KIND, LORA_KIND, TUNED_KINDS, VIT_KIND
from fp8pipe.report.blocks import Block, Drawing, Drawings, Missing, Section, Text
from fp8pipe.report.charts import Point, Series, line_chart
from fp8pipe.report.figures import Form
from fp8pipe.report.subject import Item, Subject

__all__ = ["section"]

METRICS = "metrics.jsonl"
_HEALTH = {
    "saturated": "saturation: share of targets beyond the largest code (448); more than a trace means clipping",
    "changed": "codes that the update changes; near 0 the update would vanish",
    "norm_ratio": "survival: size of the change applied over the change intended",
    "cosine": "direction of the change applied against the one intended",
}


def section(subject: Subject) -> Section:
    """The section."""
    blocks: list[Block] = []
    for item in subject.of_kind(*TUNED_KINDS, VIT_KIND):
        blocks += list(_curves(subject, item))
    if not blocks:
        blocks.append(Missing("No artifact that was trained is here.", "fp8pipe finetune, or fp8pipe quantize-vit"))
    return Section(
        "training", "Training", "The loss, and what becomes of the update on its way into the codes.", blocks
    )


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
        for prefix, when in (("flush", "flushed at each step"), ("pending", "were it rounded now")):
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
    return "distance from the teacher" if item.kind == VIT_KIND else "nats an answer token"


def _series(subject: Subject, item: Item, key: str, label: str, dashed: bool = False) -> Series | None:
    file = item.file(METRICS)
    lines = subject.documents.get(file) or []
    points = []
    for index, line in enumerate(lines):
        figure = subject.documents.figure(file, index, key, form=Form.LOSS) if key in line else None
        if figure is not None and "step" in line and figure.value == figure.value:
            points.append(Point(float(line["step"]), figure))
    return Series(label, points, dashed) if points else None
