"""How the engine runs an export: the precision of every matrix multiplication, its speed and its size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from fp8pipe.artifact.kinds import kind_named
from fp8pipe.report.blocks import Block, Lines, Missing, Table, Text
from fp8pipe.report.figures import Derive, Figure, Form
from fp8pipe.report.subject import Item, Record, Subject

LAYERS = "layers.json"
_MEASURED = (
    ("bench", "speed and size", "its speed was not measured."),
    ("serve-check", "through its service", "its service was not started and queried."),
    ("evaluate", "scores on tasks", "it was not scored on tasks."),
)


def precision(subject: Subject) -> Iterator[Block]:
    """The precision of the matrix multiplications of each export.

    For TensorRT, as listed by the engine builder; for ONNX Runtime, from its optimized graph; for other engines, how
    weights are stored and activations are quantized according to the manifest.
    """
    for item in subject.exports():
        if "tensorrt" in kind_named(item.kind).engines:
            yield from _engines(subject, item)
        elif "onnxruntime" in kind_named(item.kind).engines:
            yield from _kernels(subject, item)
        else:
            yield _stored(subject, item)


def _stored(subject: Subject, item: Item) -> Block:
    """How the manifest says that layers are stored; the engine chooses the kernels only at run time."""
    layers = item.artifact.manifest.layers
    counted = subject.documents.derived(Derive.COUNT, item.manifest, "layers", "*", "weight")
    known = subject.documents.derived(Derive.COUNT, item.manifest, "layers")
    inputs = next((str(layer.activation) for layer in layers if layer.activation is not None), "not quantized")
    told = f" linear layers are stored as codes. Activations: {inputs}."
    return Text([counted or "No", " of ", known or "no", told], item.name)


def _engines(subject: Subject, item: Item) -> Iterator[Block]:
    documents = subject.documents
    engines: dict[str, Any] = documents.get(item.file(LAYERS)) or {}
    if not engines:
        yield Missing(f"{item.name} holds no engine.", "fp8pipe export ... --target trt --compute-capability 8.9")
        return
    names = list(dict.fromkeys(name for entry in engines.values() for name in entry["precisions"]))
    rows = []
    for capability in engines:
        place = (item.file(LAYERS), capability)
        counts = [documents.figure(*place, "precisions", name, form=Form.COUNT) or "none" for name in names]
        fused = documents.figure(*place, "fused_attentions", form=Form.COUNT)
        size = documents.figure(*place, "engine_bytes", form=Form.BYTES)
        rows.append([capability, *counts, fused or "not listed", size or "not listed"])
    head = ["GPU (compute capability)", *(f"products in {name}" for name in names), "fused attentions", "engine"]
    yield Table(head, rows, f"{item.name}: as the builder lists them.", tuple(range(1, len(head))))
    first = next(iter(engines))
    groups = Counter((" × ".join(p["operands"]), p["output"]) for p in engines[first].get("products", []))
    if groups:
        kinds = ", ".join(f"{operands} to {output}" for operands, output in groups)
        yield Text([f"Operands and outputs on {first}: {kinds}."])


def _kernels(subject: Subject, item: Item) -> Iterator[Block]:
    record = item.record("validation")
    operators: dict[str, str] = subject.documents.get(record.file, "kernels", "operators") or {} if record else {}
    if record is None or not operators:
        what = f"{item.name}: the operators that run it were not looked up."
        yield Missing(what, f"fp8pipe validate {subject.where(item)}")
        return
    documents = subject.documents
    integer = documents.figure(record.file, "kernels", "integer", form=Form.COUNT)
    total = documents.derived(Derive.COUNT, record.file, "kernels", "operators")
    fallen = documents.derived(Derive.COUNT, record.file, "kernels", "float_layers")
    shown = ", ".join(dict.fromkeys(operators.values()))
    yield Text(
        [integer, " of ", total, " products run on integers in ONNX Runtime; ", fallen,
         f" that could run in float. Operators: {shown}."], item.name,
    )  # fmt: skip


def speed(subject: Subject) -> Iterator[Block]:
    """Sizes on disk, and the figures of benchmarks, serving checks and timed engine runs."""
    if subject.items:
        yield _sizes(subject)
    for item in subject.exports():
        for kind, title, absent in _MEASURED:
            record = item.record(kind)
            if record is not None:
                yield from _rows(subject, item, record, title)
            elif kind in kind_named(item.kind).measured_by:
                yield Missing(f"{item.name}: {absent}", f"fp8pipe {kind} {subject.where(item)}")
        yield from _timings(subject, item)
    if not subject.exports():
        yield Missing("There is no export to measure.", "fp8pipe export, then fp8pipe bench")


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
    place, keys = (record.file, "execution", "timings"), ("batch", "engine_ms", "fp16_ms")
    rows = [[subject.documents.figure(*place, i, key) for key in keys] for i in range(len(timings))]
    if rows:
        device = subject.documents.get(record.file, "execution", "device")
        yield Table(["images at once", "engine, ms", "FP16, ms"], rows, f"{item.name}: on {device}.", (0, 1, 2))
