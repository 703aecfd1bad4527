"""Engines of an export: where they lie, how `layers.json` describes them, and the precision that they are held to."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from exporters.tensorrt.builder import Built
from exporters.tensorrt.options import Builder
from exporters.tensorrt.precision import PrecisionReport
from fp8pipe.artifact import Comparison, Gate

__all__ = [
    "ENGINES", "LAYERS_FILE", "MODEL_FILE", "describe_engine", "engine_file", "precision_gate",
    "shown_counts", "write_layers",
]  # fmt: skip

MODEL_FILE: Final = "model.onnx"
ENGINES: Final = "engines"
LAYERS_FILE: Final = "layers.json"


def engine_file(capability: str, builder: Builder = Builder.RTX) -> str:
    """Where an engine is built in an export: `engines/rtx-8.9.engine`; `.xz` is added when it is packed."""
    return f"{ENGINES}/{'rtx' if builder is Builder.RTX else 'trt'}-{capability}.engine"


def describe_engine(root: Path, name: str, report: PrecisionReport, built: Built) -> dict[str, Any]:
    """An engine's entry for layers.json."""
    return {
        "engine": name,
        "engine_bytes": (root / name).stat().st_size,
        "precisions": report.counts(),
        "products": [product.model_dump() for product in report.products],
        "other_layers": report.other_layers,
        "builder_warnings": list(built.warnings),
        "layers": [layer.model_dump() for layer in built.layers],
    }


def write_layers(root: Path, reports: Mapping[str, Mapping[str, Any]]) -> None:
    """Write layers.json, entries by compute capability; no file where there is no engine."""
    if reports:
        (root / LAYERS_FILE).write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")


def precision_gate(report: PrecisionReport, wanted: Mapping[str, str], name: str, *, required: bool) -> Gate:
    """Products that an engine multiplies in another precision than wanted; a figure alone when not required."""
    other, kinds = report.not_in(wanted), Counter(wanted.values())
    detail = shown_counts(report.counts())
    if len(kinds) > 1:
        detail += f"; in the artifact {shown_counts(kinds)}"
    return Gate(
        name=name, value=len(other), comparison=Comparison.AT_MOST, threshold=0 if required else len(other),
        detail=detail + (f"; the first: {other[0]}" if other else ""),
    )  # fmt: skip


def shown_counts(counts: Mapping[str, int]) -> str:
    """Products by precision, in words."""
    return ", ".join(f"{count} in {name}" for name, count in sorted(counts.items()))
