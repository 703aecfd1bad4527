"""The decoder graph of a language model against its parent: made again with the export's own activation scales."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.graph.layers import ExportedLayer, read_layers
from exporters.tensorrt.language.export import SCALES_FILE
from exporters.tensorrt.language.graph import decoder_graph
from exporters.tensorrt.language.options import LanguageExportOptions
from exporters.tensorrt.language.reopen import number_gates
from exporters.tensorrt.language.source import open_language
from exporters.tensorrt.language.target import InputScale, TrtLanguageDetails
from exporters.tensorrt.lint import lint_file
from exporters.tensorrt.verify import check_engines
from exporters.verify.common import compare_files, failed_gates
from exporters.verify.graph_export import check_file, compare_graphs, compare_stored
from fp8pipe.artifact import Artifact, installed_versions
from fp8pipe.artifact.finding import Finding
from fp8pipe.models.checkpoint.sidecars import SERVED_FILES, sidecar_files

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["check_language"]

_TRACERS = ("torch", "transformers", "onnxscript", "onnx-ir")


def check_language(artifact: Artifact, parent: Path | None, notes: list[str]) -> Iterator[Finding]:
    """An export of a language model for TensorRT: the graph's file, its engines, and everything against the parent."""
    engines = artifact.manifest.details_of(TrtLanguageDetails).engines
    require = bool(artifact.manifest.config.get("require", True))
    model = yield from check_file(
        artifact, lambda path: lint_file(path, tuple(engines)).errors(require=require), readable=True
    )
    if model is None:
        return
    yield from check_engines(artifact, engines, None)
    if parent is not None:
        yield from _compare_decoder(artifact, model, read_layers(model), parent, notes)


def _compare_decoder(
    artifact: Artifact, model: ir.Model, layers: tuple[ExportedLayer, ...], parent: Path, notes: list[str]
) -> Iterator[Finding]:
    """Codes, scales and floats; the graph; tokenizer and configuration."""
    import onnx_ir as ir

    source = open_language(parent)
    stored = json.loads((artifact.root / SCALES_FILE).read_text(encoding="utf-8"))
    scales = {name: InputScale.model_validate(scale) for name, scale in stored.items()}
    yield from failed_gates(number_gates(layers, model, source, scales))
    names = (Path("config.json"), *sidecar_files(artifact.root, SERVED_FILES))
    yield from compare_files(artifact.root, parent, names, (Path("config.json"), *sidecar_files(parent, SERVED_FILES)))
    options = LanguageExportOptions.model_validate(artifact.manifest.config)
    graph = decoder_graph(source, {n: s.scale for n, s in scales.items()}, options.base, cache=options.cache)
    expected = ir.from_proto(ir.to_proto(graph.model))
    here, then = installed_versions(_TRACERS), artifact.manifest.versions
    other = [f"{n} is {here.get(n)}, not {then[n]}" for n in _TRACERS if n in then and then[n] != here.get(n)]
    found = [*compare_stored(model, expected), *compare_graphs(model, expected)]
    if other and found:
        notes.append(f"{len(found)} differences from a graph made here are not judged: "
                     f"{', '.join(other)}")  # fmt: skip
    else:
        yield from found
