"""Checks for exports to TensorRT: of vision models, of language models, and of the engines stored with a graph."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from exporters.graph.formats import MODEL_FILE, GraphOutput
from exporters.graph.layers import read_layers
from exporters.graph.produce import graph_details
from exporters.tensorrt.engines import ENGINES, LAYERS_FILE
from exporters.tensorrt.graph import in_format, typed_graph
from exporters.tensorrt.half import halve
from exporters.tensorrt.language.export import SCALES_FILE
from exporters.tensorrt.language.graph import LOGITS, decoder_graph
from exporters.tensorrt.language.reopen import number_gates
from exporters.tensorrt.language.source import language_records, open_language
from exporters.tensorrt.language.stitch import LAYERED, traced_graph
from exporters.tensorrt.language.target import InputScale, LanguageExportOptions, TrtLanguageDetails
from exporters.tensorrt.lint import lint_file
from exporters.tensorrt.listing import artifact_precisions
from exporters.tensorrt.target import Base, BuiltEngine, TrtDetails, TrtFormat
from exporters.verify.common import compare_details, compare_files, compare_json, compare_layers, failed_gates
from exporters.verify.graph_export import (
    GraphChecks,
    check_file,
    check_vision_graph,
    compare_graphs,
    compare_stored,
    other_versions,
)
from fp8pipe.artifact import Artifact, sha256_file
from fp8pipe.artifact.finding import Check, Finding
from fp8pipe.models.checkpoint.sidecars import SERVED_FILES, sidecar_files
from fp8pipe.models.vision.quantized import QuantizedVit, layer_records


def check_trt(artifact: Artifact, parent: Path | None, notes: list[str]) -> Iterator[Finding]:
    """Check an export of a vision model for TensorRT: its graph, against `parent` too if given, and its engines."""
    details, require = artifact.manifest.details_of(TrtDetails), bool(artifact.manifest.config.get("require", True))
    format, half = TrtFormat(details.format), Base(details.base) is Base.FP16

    def remake(quantized: QuantizedVit, source: str) -> tuple[ir.Model, TrtDetails]:
        graph = typed_graph(in_format(quantized, format), format, source)
        stated = graph_details(graph, quantized, format.value).model_dump()
        products = artifact_precisions(read_layers(graph.model))
        if half:
            halve(graph.model)
        base = artifact.manifest.config.get("base", details.base)
        return graph.model, TrtDetails(**stated, base=base, products=products)

    checks = GraphChecks(
        lint=lambda path: lint_file(path, tuple(details.engines)).errors(require=require), readable=not half,
        remake=remake,
        records=lambda q, known: layer_records(in_format(q, format), known, activations=not format.weight_only),
    )  # fmt: skip
    yield from check_vision_graph(artifact, parent, notes, checks)
    yield from check_engines(artifact, details.engines, details.products)


def check_engines(
    artifact: Artifact, engines: Mapping[str, BuiltEngine], products: Mapping[str, str] | None
) -> Iterator[Finding]:
    """Check engines in the manifest, in `layers.json` and on disk: each must have been built from this graph.

    `engines` and `products` (matrix multiplications of the graph) are as listed in the manifest.
    """
    listed = {entry.path for entry in artifact.manifest.files}
    graph = sha256_file(artifact.root / MODEL_FILE)
    for capability, entry in engines.items():
        if entry.engine not in listed:
            yield Finding(Check.MANIFEST, entry.engine, f"the file of the engine for {capability} is missing")
        if entry.recipe is not None and entry.recipe.graph_sha256 != graph:
            why = f"it was built from graph {entry.recipe.graph_sha256[:12]}; {MODEL_FILE} is {graph[:12]}"
            yield Finding(Check.MANIFEST, entry.engine, why)
        if entry.recipe is not None and entry.recipe.capability != capability:
            why = f"listed for {capability}, built for {entry.recipe.capability}"
            yield Finding(Check.MANIFEST, entry.engine, why)
    for path in sorted(listed):
        if path.startswith(f"{ENGINES}/") and path not in {entry.engine for entry in engines.values()}:
            yield Finding(Check.MANIFEST, path, "the manifest names no recipe for this engine")
    if not engines:
        return
    written = json.loads((artifact.root / LAYERS_FILE).read_text(encoding="utf-8"))
    said = {c: entry.model_dump(mode="json", exclude_unset=True) for c, entry in engines.items()}
    shown = {c: {key: written.get(c, {}).get(key) for key in entry} for c, entry in said.items()}
    yield from compare_json(shown, said, LAYERS_FILE)
    for capability, entry in engines.items():
        if products and sum(entry.precisions.values()) != len(products):
            why = f"{sum(entry.precisions.values())} matrix multiplications; the graph has {len(products)}"
            yield Finding(Check.MANIFEST, f"{LAYERS_FILE} for {capability}", why)


def check_language(artifact: Artifact, parent: Path | None, notes: list[str]) -> Iterator[Finding]:
    """Check an export of a language model for TensorRT: graph file, engines, and everything against the parent."""
    engines = artifact.manifest.details_of(TrtLanguageDetails).engines
    require = bool(artifact.manifest.config.get("require", True))
    model = yield from check_file(
        artifact, lambda path: lint_file(path, tuple(engines)).errors(require=require), readable=True
    )
    if model is None:
        return
    yield from check_engines(artifact, engines, None)
    if parent is not None:
        yield from _compare_decoder(artifact, model, parent, notes)


def _compare_decoder(artifact: Artifact, model: ir.Model, parent: Path, notes: list[str]) -> Iterator[Finding]:
    """Compare a decoder export with its parent: stored numbers, layer records, the graph, tokenizer and config.json.

    Differences of structure are only added to `notes` if the graph was traced with other versions of packages.
    """
    source = open_language(parent, packed=True)
    file = artifact.root / SCALES_FILE
    stored = {} if source.packed else json.loads(file.read_text(encoding="utf-8"))
    scales = {name: InputScale.model_validate(scale) for name, scale in stored.items()}
    yield from failed_gates(number_gates(model, source, scales))
    names = (Path("config.json"), *sidecar_files(artifact.root, SERVED_FILES))
    yield from compare_files(artifact.root, parent, names, (Path("config.json"), *sidecar_files(parent, SERVED_FILES)))
    options = LanguageExportOptions.model_validate(artifact.manifest.config)
    # Earlier exports, and models whose layers do not run one by one, were traced as a whole.
    layered = artifact.manifest.details_of(TrtLanguageDetails).traced == LAYERED
    trace = traced_graph if layered else decoder_graph
    graph = trace(source, {n: s.scale for n, s in scales.items()}, options.base, cache=options.cache)
    expected = _as_read(graph.model)
    other = other_versions(artifact, ("torch", "transformers", "onnxscript", "onnx-ir"))
    layers = language_records(source, options.calibration)
    yield from compare_layers(artifact.manifest, layers)
    facts = TrtLanguageDetails.model_construct(
        format=source.format.value, base=options.base.value, output=GraphOutput(name=LOGITS, what="logits"),
        activations=next((layer.activation for layer in layers if layer.activation is not None), None),
        cache=graph.cache,
        trained_activations=source.plan.source.trained_activations,
        passes={change.name: len(change.changed) for change in graph.changes},
    )  # fmt: skip
    facts = facts.model_copy(update={"traced": graph.traced}) if layered else facts
    found = [*compare_stored(model, expected), *compare_graphs(model, expected), *compare_details(artifact, facts)]
    if other and found:
        notes.append(f"{len(found)} differences from a graph traced here are not judged: {other}")
    else:
        yield from found


def _as_read(model: ir.Model) -> ir.Model:
    """A graph as it would be read from its file; stored tensors stay where they are until they are compared."""
    stored = {name: value.const_value for name, value in model.graph.initializers.items()}
    for name, value in model.graph.initializers.items():
        value.const_value = ir.tensor(np.zeros(0, np.float32), name=name)
    read = ir.from_proto(ir.to_proto(model))
    for held in (model, read):
        for name, value in held.graph.initializers.items():
            value.const_value = stored[name]
    return read
