"""What every export of a vision model does alike: the files beside the graph, and gates that must hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fp8pipe.artifact import ArtifactWriter, Gate
from fp8pipe.core.errors import GateFailedError
from fp8pipe.models.vision.preprocessing import PREPROCESSING_FILE, write_model_file

if TYPE_CHECKING:
    from fp8pipe.models.vision.quantized import QuantizedVit

__all__ = ["CLASSES_FILE", "MODEL_FILE", "require_gates", "write_description"]

CLASSES_FILE: Final = "classes.json"
MODEL_FILE: Final = "model.onnx"


def write_description(root: Path, quantized: QuantizedVit) -> None:
    """Write preprocessing.json, and classes.json for a classifier."""
    write_model_file(quantized.preprocessing, root / PREPROCESSING_FILE)
    if quantized.architecture.classes is not None:
        text = json.dumps(quantized.architecture.classes, ensure_ascii=False, indent=2) + "\n"
        (root / CLASSES_FILE).write_text(text, encoding="utf-8")


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
            why="\n       ".join(f"{g.name}: {g.value:g} against {g.threshold:g}; {g.detail}" for g in failed),
            fix=fix,
        )
