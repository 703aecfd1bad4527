"""Checks on exports to ONNX."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from exporters.graph.formats import OnnxFormat
from exporters.graph.produce import quantize_graph
from exporters.onnx.target import OnnxDetails
from exporters.tensorrt.lint import lint_file
from exporters.verify.graph_export import GraphChecks, check_vision_graph
from fp8pipe.artifact import Artifact
from fp8pipe.artifact.finding import Finding
from fp8pipe.models.vision.quantized import layer_records

# Rules of the linter that speak of any runtime; the others are about TensorRT's builder.
_ANY_RUNTIME: Final = ("scale-value", "scale-infinite", "nan-code", "scale-shape", "block-size", "codes-undecoded")


def check_onnx(artifact: Artifact, parent: Path | None, notes: list[str]) -> Iterator[Finding]:
    """An export for ONNX Runtime."""
    format = OnnxFormat(artifact.manifest.details_of(OnnxDetails).format)
    checks = GraphChecks(
        lint=lambda path: [found for found in lint_file(path, ()).findings if found.rule in _ANY_RUNTIME],
        readable=True,
        remake=lambda quantized, source: quantize_graph(quantized, format, source).model,
        records=lambda quantized: layer_records(quantized, activations=format.quantizes_activations),
    )
    yield from check_vision_graph(artifact, parent, notes, checks)
