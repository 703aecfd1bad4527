"""Checks for exports to ONNX."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import onnx_ir as ir

from exporters.graph.formats import GraphDetails, OnnxFormat
from exporters.graph.produce import graph_details, quantize_graph
from exporters.onnx.target import OnnxDetails
from exporters.tensorrt.lint import lint_file
from exporters.verify.graph_export import GraphChecks, check_vision_graph
from fp8pipe.artifact import Artifact
from fp8pipe.artifact.finding import Finding
from fp8pipe.models.vision.quantized import QuantizedVit, layer_records

# The rules of TensorRT's linter that apply to any runtime; the others concern only TensorRT's builder.
_ANY_RUNTIME: Final = ("scale-value", "scale-infinite", "nan-code", "scale-shape", "block-size", "codes-undecoded")


def check_onnx(artifact: Artifact, parent: Path | None, notes: list[str]) -> Iterator[Finding]:
    """Check an export for ONNX Runtime, against `parent`, the artifact's directory, too if it is given."""
    format = OnnxFormat(artifact.manifest.details_of(OnnxDetails).format)

    def remake(quantized: QuantizedVit, source: str) -> tuple[ir.Model, GraphDetails]:
        graph = quantize_graph(quantized, format, source)
        return graph.model, graph_details(graph, quantized, format.value)

    checks = GraphChecks(
        lint=lambda path: [found for found in lint_file(path, ()).findings if found.rule in _ANY_RUNTIME],
        readable=True,
        remake=remake,
        records=lambda quantized, source: layer_records(quantized, source, activations=format.quantizes_activations),
    )
    yield from check_vision_graph(artifact, parent, notes, checks)
