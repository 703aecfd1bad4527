"""What every export of a vision model does alike: the files beside the graph, and gates that must hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from exporters.graph.details import GraphDetails, GraphInput, GraphOutput
from fp8pipe.artifact import ArtifactWriter, Gate
from fp8pipe.core.errors import GateFailedError
from fp8pipe.models.vision.preprocessing import PREPROCESSING_FILE, write_model_file

if TYPE_CHECKING:
    from exporters.graph.produce import QuantizedGraph
    from fp8pipe.models.vision.quantized import QuantizedVit

__all__ = [
    "CLASSES_FILE",
    "INPUT_NAME",
    "MODEL_FILE",
    "OUTPUT_NAME",
    "graph_details",
    "require_gates",
    "write_description",
]

CLASSES_FILE: Final = "classes.json"
MODEL_FILE: Final = "model.onnx"
INPUT_NAME: Final = "pixels"
OUTPUT_NAME: Final = "logits"


def write_description(root: Path, quantized: QuantizedVit) -> None:
    """Write preprocessing.json, and classes.json for a classifier."""
    write_model_file(quantized.preprocessing, root / PREPROCESSING_FILE)
    if quantized.architecture.classes is not None:
        text = json.dumps(quantized.architecture.classes, ensure_ascii=False, indent=2) + "\n"
        (root / CLASSES_FILE).write_text(text, encoding="utf-8")


def graph_details(graph: QuantizedGraph, quantized: QuantizedVit, format: str) -> GraphDetails:
    """What the manifest says of the graph."""
    return GraphDetails(
        format=format,
        input=GraphInput(name=INPUT_NAME, shape=("batch", 3, *quantized.architecture.image_size)),
        output=GraphOutput(name=OUTPUT_NAME, what="logits" if quantized.architecture.classes else "features"),
        passes={change.name: len(change.changed) for change in graph.changes},
    )


def require_gates(writer: ArtifactWriter, gates: Sequence[Gate], what: str, fix: str) -> None:
    """Record the gates of an export, and refuse it when they do not all pass.

    Args:
        writer: of the export.
        gates: all of them.
        what: what failed, in words; the number of failed gates is added.
        fix: what the user can do.

    Raises:
        GateFailedError: with every failed gate's value, threshold and detail.
    """
    for gate in gates:
        writer.gate(gate)
    failed = [gate for gate in gates if not gate.passed]
    if failed:
        raise GateFailedError(
            f"{what} ({len(failed)} gate(s) failed)",
            why="\n       ".join(map(str, failed)),
            fix=fix,
        )
