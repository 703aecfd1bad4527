"""Sections on the quality of the models, and on the agreement of the engine's results with the exported model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fp8pipe.artifact.kinds import TUNED_KINDS, VIT_KIND, VitDetails, kind_named
from fp8pipe.report.blocks import Block, Drawing, Drawings, Lines, Missing, Table, Text
from fp8pipe.report.charts import grid
from fp8pipe.report.figures import Badge, Derive, Form
from fp8pipe.report.subject import Item, Record, Subject


def accuracy(subject: Subject) -> Iterator[Block]:
    """Accuracy, losses and perplexity of each artifact, compared with the models that it was made from."""
    blocks: list[Block] = [_vision(subject, item) for item in subject.of_kind(VIT_KIND)]
    blocks += _losses(subject)
    for item in subject.items:
        blocks += _perplexity(subject, item)
    for item in subject.items:
        blocks += [*_agreement(subject, item), *_answers(subject, item)]
    if not blocks:
        command = f"fp8pipe validate {subject.where(subject.items[0])}" if subject.items else "fp8pipe run"
        what = "No accuracy was measured here; see the artifact it was made from, and records of validations."
        blocks.append(Missing(what, command))
    return iter(blocks)


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
        caption = "Held-out loss, nats per answer token; lower is better. Deployed: of the weights that are saved."
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
        rows += [["standard error of the difference, nats per token", error], ["tokens", tokens]]
        caption = f"{item.name}: perplexity on held-out text; lower is better."
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


def parity(subject: Subject) -> Iterator[Block]:
    """For each export, the validation's verdict, errors by layer, and what was and was not proved."""
    for item in subject.exports():
        record = item.record("validation")
        if record is None:
            unused = next((r.finding for r in item.records if r.kind == "validation"), "")
            what = f"{unused}." if unused else "it was not validated."
            command = f"fp8pipe validate {subject.where(item)}"
            if not kind_named(item.kind).engines:
                what, command = "no engine here reads this layout, so its arithmetic is not proved.", ""
            yield Missing(f"{item.name}: {what}", command)
            continue
        told, engine = (subject.documents.get(record.file, key) for key in ("verdict", "engine"))
        yield Text([Badge(str(told)), f" in {engine}"], item.name)
        yield from _layers(subject, record)
        yield from _inside_vllm(subject, record)
        yield from _proofs(subject, record)


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
    held = {key for key in ("weights", "logprobs", "served") if documents.get(record.file, key) is not None}
    if not held & {"weights", "served"}:
        return
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
            ("as served: weights read back", ("served", "weights", "elements"), Form.COUNT),
            ("as served: weights whose bits differ", ("served", "weights", "differing"), Form.COUNT),
            ("as served: divergence from fp32, nats per token", ("served", "engine_kl"), Form.PLAIN),
            ("as served: noise of the form in torch, nats per token", ("served", "noise_kl"), Form.PLAIN),
            ("as served: accepted divergence, nats per token", ("served", "bound_kl"), Form.PLAIN),
            ("as served: share of first choices that agree with fp32", ("served", "agreement"), Form.PLAIN),
        )
        if place[0] in held
    ]
    yield Table(["compared", "value"], rows, "Weights and arithmetic inside the engine.", (1,))


def _proofs(subject: Subject, record: Record) -> Iterator[Block]:
    for key, title in (("proved", "What holds:"), ("not_proved", "What was not tried, and why:")):
        lines = subject.documents.quotes(record.file, key)
        if lines:
            yield Lines(title, lines)
