"""Checks on exports of vision models to TensorRT, and on the engines beside a graph."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.tensorrt.engines import ENGINES, LAYERS_FILE, MODEL_FILE
from exporters.tensorrt.formats import in_format
from exporters.tensorrt.graph import typed_graph
from exporters.tensorrt.half import halve
from exporters.tensorrt.lint import lint_file
from exporters.tensorrt.options import Base, TrtFormat
from exporters.tensorrt.target import BuiltEngine, TrtDetails
from exporters.verify.common import compare_json
from exporters.verify.graph_export import GraphChecks, check_vision_graph
from fp8pipe.artifact import Artifact, LayerRecord, sha256_file
from fp8pipe.artifact.finding import Check, Finding
from fp8pipe.models.vision.quantized import QuantizedVit, layer_records

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["check_engines", "check_trt"]


def check_trt(artifact: Artifact, parent: Path | None, notes: list[str]) -> Iterator[Finding]:
    """An export of a vision model for TensorRT."""
    details, require = artifact.manifest.details_of(TrtDetails), bool(artifact.manifest.config.get("require", True))
    format, half = TrtFormat(details.format), Base(details.base) is Base.FP16

    def remake(quantized: QuantizedVit, source: str) -> ir.Model:
        graph = typed_graph(in_format(quantized, format), format, source).model
        if half:
            halve(graph)
        return graph

    def records(quantized: QuantizedVit) -> list[LayerRecord]:
        return layer_records(in_format(quantized, format), activations=not format.weight_only)

    checks = GraphChecks(
        lint=lambda path: lint_file(path, tuple(details.engines)).errors(require=require), readable=not half,
        remake=remake, records=records,
    )  # fmt: skip
    yield from check_vision_graph(artifact, parent, notes, checks)
    yield from check_engines(artifact, details.engines, details.products)


def check_engines(
    artifact: Artifact, engines: Mapping[str, BuiltEngine], products: Mapping[str, str] | None
) -> Iterator[Finding]:
    """Engines in the manifest, in `layers.json` and on the disk: each must be of this graph.

    Args:
        artifact: the export.
        engines: as the manifest lists them.
        products: of the graph, where the manifest lists them.
    """
    listed = {entry.path for entry in artifact.manifest.files}
    graph = sha256_file(artifact.root / MODEL_FILE)
    for capability, entry in engines.items():
        if entry.engine not in listed:
            yield Finding(Check.MANIFEST, entry.engine, f"the engine for {capability} is not in the export")
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
            why = f"{sum(entry.precisions.values())} products; the graph has {len(products)}"
            yield Finding(Check.MANIFEST, f"{LAYERS_FILE} for {capability}", why)
