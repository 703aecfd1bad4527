"""How good the answers are: accuracy and losses beside those of the teacher, the untuned model and the baselines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fp8pipe.artifact.kinds import TUNED_KINDS, VIT_KIND, VitDetails
from fp8pipe.report.blocks import Block, Missing, Section, Table, Text
from fp8pipe.report.figures import Derive, Form
from fp8pipe.report.subject import Item, Subject

__all__ = ["section"]


def section(subject: Subject) -> Section:
    """The section."""
    blocks: list[Block] = []
    for item in subject.of_kind(VIT_KIND):
        blocks.append(_vision(subject, item))
    blocks += list(_losses(subject))
    for item in subject.items:
        blocks += list(_perplexity(subject, item))
    for item in subject.items:
        blocks += list(_agreement(subject, item))
        blocks += list(_answers(subject, item))
    if not blocks:
        first = subject.items[0] if subject.items else None
        command = f"fp8pipe validate {subject.where(first)}" if first else "fp8pipe run"
        what = "No accuracy was measured here; see the artifact it was made from, and records of validations."
        blocks.append(Missing(what, command))
    return Section("accuracy", "Accuracy", "The low-bit model beside the one it was made from.", blocks)


def _vision(subject: Subject, item: Item) -> Block:
    documents = subject.documents
    images = documents.figure(item.manifest, "details", "accuracy", "images", form=Form.COUNT)
    if images is None:
        return Missing(
            f"{item.name} was not evaluated on labelled pictures.", "fp8pipe quantize-vit ... --evaluate FOLDER"
        )
    rows = []
    precision = item.artifact.manifest.details_of(VitDetails).precision
    for key, name in (("teacher", "original, full precision"), ("quantized", precision)):
        place = ("details", "accuracy", key)
        top1, top5 = (documents.figure(item.manifest, *place, top, form=Form.PERCENT) for top in ("top1", "top5"))
        rows.append([name, top1, top5, images])
    return Table(["model", "top-1", "top-5", "pictures"], rows, f"{item.name}: held-out labelled pictures.", (1, 2, 3))


def _losses(subject: Subject) -> Iterator[Block]:
    rows: list[list[Any]] = []
    for item in subject.of_kind(*TUNED_KINDS):
        method = str(item.artifact.manifest.config.get("method", item.kind))
        for key in ("untuned", "deployed"):
            loss = subject.documents.figure(item.manifest, "details", "heldout_loss", key, form=Form.LOSS)
            if loss is not None:
                rows.append([item.name, method, key, loss])
    if rows:
        caption = "Held-out loss, nats an answer token; less is better. Deployed: of the weights that are saved."
        yield Table(["artifact", "method", "weights", "loss"], rows, caption, (3,))
        methods = {row[1] for row in rows}
        if len(methods) == 1 and "falqon" in methods:
            yield Missing("No baseline ran beside it.", "fp8pipe finetune --method lora, with the same data and steps")


def _perplexity(subject: Subject, item: Item) -> Iterator[Block]:
    place = ("details", "perplexity")
    own, served, error, tokens = (
        subject.documents.figure(item.manifest, *place, key) for key in ("own", "served", "error", "tokens")
    )
    if own is not None and served is not None:
        rows = [["the artifact, activations as trained", own], ["the exported graph", served]]
        rows += [["standard error of the difference, nats a token", error], ["tokens", tokens]]
        caption = f"{item.name}: perplexity on held-out text; less is better."
        yield Table(["perplexity of", "value"], rows, caption, (1,))


def _agreement(subject: Subject, item: Item) -> Iterator[Block]:
    record = item.record("validation")
    if record is None:
        return
    agreeing, images = (
        subject.documents.figure(record.file, "classes", key, form=Form.COUNT) for key in ("agreeing", "images")
    )
    if agreeing is not None and images is not None:
        where = subject.documents.get(record.file, "classes", "source")
        told = f" images get the same class in the engine and in torch ({where})."
        yield Text([agreeing, " of ", images, told], item.name)


def _answers(subject: Subject, item: Item) -> Iterator[Block]:
    record = item.record("validation")
    canary = subject.documents.get(record.file, "canary") if record is not None else None
    if record is None or not canary:
        return
    rows = []
    for index, answer in enumerate(canary):
        agreeing = subject.documents.figure(record.file, "canary", index, "agreeing_tokens", form=Form.COUNT)
        tokens = subject.documents.figure(record.file, "canary", index, "tokens", form=Form.COUNT)
        said = subject.documents.quote(record.file, "canary", index, "answer")
        rows.append([answer["prompt"], said or "(empty)", [agreeing, " of ", tokens], answer["verdict"]])
    head = ["question", "the engine's answer", "tokens as in torch", "verdict"]
    yield Table(head, rows, f"{item.name}: answers inside the engine.", (2,))
    count = subject.documents.derived(Derive.COUNT, record.file, "canary")
    yield Text([count, " questions are a sign of life, not a measure of quality."])
