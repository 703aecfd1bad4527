"""Gates as code: figures that stages wrote, judged by the recipe's thresholds, and the gates that stages judged.

REGRESSION: a finite figure on the wrong side. ANOMALOUS: a figure that is missing or not finite, or two things that
must be equal and are not. INFEASIBLE: the stage could not run here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from fp8pipe.artifact import MANIFEST_NAME, read_manifest
from fp8pipe.artifact.gate import Comparison, Gate, Verdict, number_of, read_gate
from fp8pipe.core.errors import BadArtifactError
from pipeline.workflow.recipe import GateSpec, StageSpec

__all__ = ["document_of", "figure_at", "inside", "judge", "verdict_of_failure"]

# Exit codes that say something about this machine or this export, and nothing about the recipe's text.
_INFEASIBLE: Final = frozenset((11, 13, 15))
_ANOMALOUS: Final = frozenset((12, 14))
_ACCEPTED: Final = frozenset(("ACCEPT", "PROVED-WITHOUT-RUNNING"))


def verdict_of_failure(exit_code: int) -> Verdict | None:
    """What a failed stage's exit code means; None where the run itself must end with it."""
    if exit_code in _INFEASIBLE:
        return Verdict.INFEASIBLE
    return Verdict.ANOMALOUS if exit_code in _ANOMALOUS else None


def document_of(output: Path) -> tuple[Path, dict[str, Any]]:
    """The manifest of an artifact in today's schema, or a record: its file, and its content, or nothing."""
    path = output / MANIFEST_NAME if output.is_dir() else output
    try:
        document = read_manifest(output).plain() if output.is_dir() else json.loads(path.read_bytes())
    except (OSError, ValueError, BadArtifactError):
        return path, {}
    return path, document if isinstance(document, dict) else {}


def figure_at(document: Any, path: str) -> float | None:
    """The number at a dotted path (`details.accuracy.quantized.top1`, `canary.0.tokens`); None where there is none."""
    here = document
    for part in path.split("."):
        if isinstance(here, Mapping) and part in here:
            here = here[part]
        elif isinstance(here, list) and part.isdigit() and int(part) < len(here):
            here = here[int(part)]
        else:
            return None
    return number_of(here)


def judge(spec: StageSpec, directory: Path, outputs: Mapping[str, Path]) -> list[Gate]:
    """All gates of a stage that has ended: those its output carries, its record's verdict, and the recipe's.

    `directory` is the run's, for the sources of figures; `outputs` are what every stage wrote, by name.
    """
    path, document = document_of(outputs[spec.name])
    where = inside(path, directory)
    found = [
        read_gate(gate).model_copy(update={"source": f"{where}#gates.{index}.value"})
        for index, gate in enumerate(document.get("gates") or [])
    ]
    if "verdict" in document:
        found.append(_recorded(document, f"{where}#verdict"))
    return found + [judged for gate in spec.gates for judged in _judged(gate, where, document, directory, outputs)]


def _recorded(document: Mapping[str, Any], source: str) -> Gate:
    said = str(document["verdict"])
    reasons = document.get("reasons") or document.get("not_proved") or []
    return Gate(
        name=f"verdict of the record: {said}", value=float(said in _ACCEPTED), comparison=Comparison.EQUAL,
        threshold=1.0, detail="; ".join(map(str, reasons)), source=source,
    )  # fmt: skip


def _judged(gate: GateSpec, where: str, document: Any, directory: Path, outputs: Mapping[str, Path]) -> Iterator[Gate]:
    """One gate for each bound."""
    value, source = figure_at(document, gate.figure), f"{where}#{gate.figure}"
    for operation, other in (("-", gate.minus), ("/", gate.over)):
        if other is None:
            continue
        stage, hash_sign, inner = other.rpartition("#")
        place, held = document_of(outputs[stage]) if hash_sign and stage in outputs else (directory / where, document)
        second = figure_at(held, inner)
        source += f" {operation} {inside(place, directory)}#{inner}"
        if value is None or second is None:
            value = None
        elif operation == "-":
            value -= second
        else:
            value = value / second if second else math.nan
    for comparison, bound in ((Comparison.AT_LEAST, gate.at_least), (Comparison.AT_MOST, gate.at_most)):
        if bound is not None:
            yield Gate(
                name=gate.name, value=value, comparison=comparison, threshold=bound, detail=gate.reason, source=source,
                failure=Verdict.REGRESSION,
            )  # fmt: skip


def inside(path: Path, directory: Path) -> str:
    """The path relative to the directory where it lies in it, or as it is."""
    return path.relative_to(directory).as_posix() if path.is_relative_to(directory) else str(path)
