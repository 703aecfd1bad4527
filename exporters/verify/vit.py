"""Checks on quantized vision transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from exporters.graph.formats import OnnxFormat
from exporters.graph.lint import lint_model
from exporters.verify.common import compare_json, compare_layers, lint_findings
from fp8pipe.artifact import Artifact
from fp8pipe.artifact.finding import Check, Finding
from fp8pipe.models.vision.encodings import layer_records
from fp8pipe.models.vision.preprocessing import PREPROCESSING_FILE
from fp8pipe.models.vision.quantized import load_quantized
from fp8pipe.numerics.kinds import Kind, granularity

__all__ = ["check_vit"]


def check_vit(artifact: Artifact, parent: Path | None, notes: list[str]) -> Iterator[Finding]:
    """An artifact of `quantize-vit`."""
    quantized = load_quantized(artifact.root)
    yield from lint_findings(lint_model(quantized, OnnxFormat.QDQ, runtime=False))
    manifest = artifact.manifest
    if manifest.preprocessing is not None:
        yield from compare_json(
            quantized.preprocessing.model_dump(mode="json"), manifest.preprocessing, PREPROCESSING_FILE
        )
    if manifest.layers:
        yield from compare_layers(manifest.layers, layer_records(quantized))
    kinds = {weight.kind for weight in quantized.weights.values()}
    kind = next((kind for kind in (Kind.NVFP4, Kind.E4M3) if kind in kinds), Kind.INT)
    stated = manifest.number_format
    if stated is not None and stated.granularity != granularity(kind):
        why = f"the manifest says {stated.granularity}; the files hold {kind} codes, {granularity(kind)}"
        yield Finding(Check.MANIFEST, "number_format", why)
