"""Gates for TensorRT exports that need no GPU: on the graph itself, and on the precisions stored in an engine."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from exporters.graph.between import between_gates, parent_pieces
from exporters.graph.formats import MODEL_FILE, OnnxFormat
from exporters.graph.images import probe_images
from exporters.graph.layers import read_layers
from exporters.graph.reopen import reopen_gates
from exporters.tensorrt.engine_cache import ReadyEngine
from exporters.tensorrt.engines import shown_counts
from exporters.tensorrt.graph import in_format
from exporters.tensorrt.half import in_half, in_single
from exporters.tensorrt.listing import PrecisionReport, artifact_precisions
from exporters.tensorrt.parity import product_gates
from exporters.tensorrt.target import Base, TrtDetails, TrtFormat
from fp8pipe.artifact import Artifact, Comparison, Gate, none_of
from fp8pipe.models.vision.quantized import load_quantized

__all__ = ["graph_gates", "is_waived", "precision_gates"]

_LAYER_IMAGES: Final = 4


def graph_gates(artifact: Artifact, source: Artifact) -> list[Gate]:
    """Compare the graph of an export with the quantized artifact `source` that it was made from.

    Returns:
        Gates on the stored numbers, on the matrix multiplications, and on the parts of the graph between them.
    """
    details = artifact.manifest.details_of(TrtDetails)
    half, format = Base(details.base) is Base.FP16, TrtFormat(details.format)
    parent = in_format(load_quantized(source.root), format)
    parent = in_half(parent) if half else parent
    model = in_single(ir.load(artifact.root / MODEL_FILE))
    layers = read_layers(model)
    pixels = probe_images(source.root, parent.preprocessing, _LAYER_IMAGES).pixels
    pieces = parent_pieces(model, layers, parent, pixels, half=half)
    return [
        *reopen_gates(model, layers, parent, OnnxFormat.QDQ), *product_gates(model, layers, parent, pixels),
        *between_gates(model, layers, pieces, engine=False),
    ]  # fmt: skip


def precision_gates(artifact: Artifact, engine: ReadyEngine, report: PrecisionReport) -> list[Gate]:
    """Check the precision of every matrix multiplication in an engine.

    Args:
        artifact: the export.
        engine: the engine, with the precisions listed when it was built.
        report: the precisions read from the engine itself.

    Returns:
        Two gates: on the precisions that differ from the graph's, and on those that differ from the list.
    """
    format, counts = TrtFormat(artifact.manifest.details_of(TrtDetails).format), report.counts()
    wanted = artifact_precisions(read_layers(ir.load(artifact.root / MODEL_FILE)))
    other = () if format.weight_only else report.not_in(wanted)
    listed = sum(abs(counts.get(n, 0) - engine.precisions.get(n, 0)) for n in {*counts, *engine.precisions})
    place, shown = engine.recipe.capability, shown_counts(counts)
    return [
        Gate(
            name=f"products not in {format} for {place}", value=len(other), comparison=Comparison.AT_MOST,
            threshold=len(other) if is_waived(artifact) else 0,
            detail=f"read from the engine: {shown}{'; the first: ' + other[0] if other else ''}",
        ),
        none_of(
            f"products listed otherwise than in the engine for {place}", listed,
            f"listed: {shown_counts(engine.precisions)}; in the engine: {shown}",
        ),
    ]  # fmt: skip


def is_waived(artifact: Artifact) -> bool:
    """Whether the export was made without requiring precisions (`--no-require`)."""
    return not artifact.manifest.config["require"]
