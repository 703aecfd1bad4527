"""Evaluate the gates of a stage: the recipe's thresholds on its figures, and gates that the stage evaluated itself.

Verdicts of failed gates: REGRESSION if a finite figure is on the wrong side of its threshold; ANOMALOUS if a figure is
missing or not finite, or if two things that must be equal differ; INFEASIBLE if the stage cannot run on this machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from fp8pipe.artifact import MANIFEST_NAME, read_manifest
from fp8pipe.artifact.gate import Comparison, Gate, Verdict, failures, none_of, number_of, read_gate
from fp8pipe.artifact.verdict import VerdictRecord, read_verdict
from fp8pipe.core.errors import BadArtifactError, GateFailedError
from pipeline.workflow.recipe import GateSpec, StageSpec

__all__ = ["figure_at", "inside", "judge", "said_by_gates", "verdict_of_failure"]

# Exit codes of failures caused by this machine (infeasible) or by the stage's input or output (anomalous), and not by
# mistakes in the recipe.
_INFEASIBLE: Final = frozenset((11, 13, 15))
_ANOMALOUS: Final = frozenset((12, 14))


def verdict_of_failure(exit_code: int) -> Verdict | None:
    """The verdict that corresponds to a failed stage's exit code; None if the run must fail with that exit code."""
    if exit_code in _INFEASIBLE:
        return Verdict.INFEASIBLE
    return Verdict.ANOMALOUS if exit_code in _ANOMALOUS else None


def said_by_gates(exit_code: int, artifact: Path) -> bool:
    """Whether a stage's exit code only means that gates failed, and the artifact it wrote contains these gates."""
    return exit_code == GateFailedError.exit_code and bool(failures(read_manifest(artifact).gates))


def _written(output: Path) -> tuple[Path, dict[str, Any], VerdictRecord | None]:
    """Read the manifest of an artifact, or a verdict record.

    Args:
        output: the directory of an artifact, or the file of a verdict record.

    Returns:
        The file that was read, its content, and the verdict record (None for an artifact).

    Raises:
        BadArtifactError: there is no output, or it is damaged.
    """
    if output.is_dir():
        return output / MANIFEST_NAME, read_manifest(output).plain(), None
    record = read_verdict(output)
    return output, record.document, record


def figure_at(document: Any, path: str) -> float | None:
    """The number in `document` at a dotted path such as `details.accuracy.quantized.top1` or `canary.0.tokens`.

    None if there is no number at that path.
    """
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
    """Evaluate all gates of a finished stage.

    Args:
        spec: the stage.
        directory: the directory of the run, to which the sources of figures are given relative.
        outputs: the output of every stage, by name.

    Returns:
        The gates in the stage's output, a gate for the verdict if that output is a verdict record, and the gates of the
        recipe. If the output cannot be read, a failed gate takes the place of the first two.
    """
    try:
        path, document, record = _written(outputs[spec.name])
    except BadArtifactError as error:  # the recipe's gates fail too, as their figures are missing
        where, document, record = inside(outputs[spec.name], directory), {}, None
        lost = none_of("outputs that cannot be read", 1, f"{error.what}: {error.why}")
        found = [lost.model_copy(update={"source": f"{where}#gates.0"})]
    else:
        where = inside(path, directory)
        found = []
    found += [
        read_gate(gate).model_copy(update={"source": f"{where}#gates.{index}.value"})
        for index, gate in enumerate(document.get("gates") or [])
    ]
    if record is not None:
        found.append(_recorded(record, f"{where}#verdict"))
    return found + [judged for gate in spec.gates for judged in _judged(gate, where, document, directory, outputs)]


def _recorded(record: VerdictRecord, source: str) -> Gate:
    said = record.said
    return Gate(
        name=f"verdict of the record: {record.verdict}", value=float(said is Verdict.ACCEPT), threshold=1.0,
        detail="; ".join(record.reasons or record.not_proved), source=source,
        failure=Verdict.ANOMALOUS if said is Verdict.ACCEPT else said,
    )  # fmt: skip


def _judged(gate: GateSpec, where: str, document: Any, directory: Path, outputs: Mapping[str, Path]) -> Iterator[Gate]:
    """Yield one gate for each bound of a recipe's gate (`at_least`, `at_most`).

    Args:
        gate: the gate as given in the recipe.
        where: the file with the stage's figures, relative to the directory of the run.
        document: the content of that file.
        directory: the directory of the run.
        outputs: the output of every stage, by name.
    """
    value, source = figure_at(document, gate.figure), f"{where}#{gate.figure}"
    for operation, other in (("-", gate.minus), ("/", gate.over)):
        if other is None:
            continue
        stage, hash_sign, inner = other.rpartition("#")
        place, held = directory / where, document
        if hash_sign and stage in outputs:
            place, held = _held(outputs[stage])
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


def _held(output: Path) -> tuple[Path, dict[str, Any]]:
    try:
        return _written(output)[:2]
    except BadArtifactError:
        return output, {}


def inside(path: Path, directory: Path) -> str:
    """`path` relative to `directory` if it is inside that directory, otherwise unchanged."""
    return path.relative_to(directory).as_posix() if path.is_relative_to(directory) else str(path)
