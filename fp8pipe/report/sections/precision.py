"""In which precision every product really runs: the builder's own listing, and ONNX Runtime's optimized graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from fp8pipe.artifact.kinds import kind_named
from fp8pipe.report.blocks import Block, Missing, Section, Table, Text
from fp8pipe.report.figures import Derive, Form
from fp8pipe.report.subject import Item, Subject

__all__ = ["section"]

LAYERS = "layers.json"


def section(subject: Subject) -> Section:
    """The section."""
    blocks: list[Block] = []
    for item in subject.exports():
        if "tensorrt" in kind_named(item.kind).engines:
            blocks += list(_engines(subject, item))
        elif "onnxruntime" in kind_named(item.kind).engines:
            blocks += list(_kernels(subject, item))
        else:
            blocks.append(_stored(subject, item))
    if not blocks:
        blocks.append(Missing("No engine and no graph is here.", "fp8pipe export ... --target trt, or --target onnx"))
    return Section("precision", "Precision in the engine", "What each product is really multiplied in.", blocks)


def _stored(subject: Subject, item: Item) -> Block:
    """What the manifest says of layers whose kernels the engine chooses when it runs."""
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
