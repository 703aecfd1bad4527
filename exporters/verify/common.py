"""What the checks of all kinds share: gates and findings as discrepancies, JSON compared key by key."""

from __future__ import annotations

import filecmp
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from exporters.graph.findings import Finding
from fp8pipe.artifact import Artifact, Gate, LayerRecord
from fp8pipe.artifact.discrepancy import Catcher, Discrepancy

__all__ = [
    "compare_files",
    "compare_gates",
    "compare_json",
    "compare_layers",
    "failed_gates",
    "from_finding",
    "lint_discrepancies",
]


def from_finding(finding: Finding) -> Discrepancy:
    """A linter's finding."""
    return Discrepancy(Catcher.LINT, finding.tensor, f"{finding.why} ({finding.rule})")


def lint_discrepancies(findings: Iterable[Finding]) -> Iterator[Discrepancy]:
    """A linter's findings."""
    return map(from_finding, findings)


def failed_gates(gates: Sequence[Gate]) -> Iterator[Discrepancy]:
    """Gates that were asked again and fail now."""
    for gate in gates:
        if not gate.passed:
            yield Discrepancy(Catcher.PARITY, gate.name, f"{gate.value:g} against {gate.threshold:g}; {gate.detail}")


def compare_gates(artifact: Artifact, again: Sequence[Gate]) -> Iterator[Discrepancy]:
    """What the manifest says of gates, against the same gates asked again.

    Args:
        artifact: with its manifest.
        again: gates whose values follow from the files alone.
    """
    recorded = {gate.name: gate for gate in artifact.manifest.gates}
    for gate in again:
        old = recorded.get(gate.name)
        if old is None:
            yield Discrepancy(Catcher.MANIFEST, f"gate {gate.name}", "the manifest does not hold it")
        elif (old.threshold, old.passed) != (gate.threshold, gate.passed) or not _close(old.value, gate.value):
            why = f"the manifest says {_gate(old)}; asked again it is {_gate(gate)}"
            yield Discrepancy(Catcher.MANIFEST, f"gate {gate.name}", why)


def _close(recorded: float, again: float) -> bool:
    """Whether a gate's value is the same one: counts exactly, norms up to the order of their sums."""
    return recorded == again or (not float(again).is_integer() and math.isclose(recorded, again, rel_tol=1e-3))


def _gate(gate: Gate) -> str:
    return f"{gate.value:g} against {gate.threshold:g}, {'passed' if gate.passed else 'failed'}"


def compare_json(found: Any, expected: Any, where: str, path: str = "") -> Iterator[Discrepancy]:
    """Every leaf in which two JSON values differ, by its path."""
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted(found.keys() | expected.keys()):
            inner = f"{path}.{key}" if path else str(key)
            if key not in found:
                yield Discrepancy(Catcher.MANIFEST, where, f"{inner} is missing; expected {_short(expected[key])}")
            elif key not in expected:
                yield Discrepancy(Catcher.MANIFEST, where, f"{inner} is {_short(found[key])}; expected no such key")
            else:
                yield from compare_json(found[key], expected[key], where, inner)
    elif isinstance(found, list) and isinstance(expected, list) and all(isinstance(x, str) for x in found + expected):
        for name in sorted(set(found) ^ set(expected)):
            why = "is there and must not be" if name in found else "is missing"
            yield Discrepancy(Catcher.MANIFEST, where, f"{path}: {name} {why}")
        if sorted(found) != sorted(expected) and set(found) == set(expected):
            yield Discrepancy(Catcher.MANIFEST, where, f"{path} names something twice")
    elif found != expected:
        yield Discrepancy(Catcher.MANIFEST, where, f"{path or 'its content'} is {_short(found)}; expected "
                          f"{_short(expected)}")  # fmt: skip


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def compare_layers(found: Sequence[LayerRecord], expected: Sequence[LayerRecord]) -> Iterator[Discrepancy]:
    """The manifest's layers against those of the files; reasons are words, and not compared."""
    ours, theirs = ({layer.name: layer for layer in layers} for layers in (expected, found))
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in theirs:
            yield Discrepancy(Catcher.MANIFEST, name, "the manifest does not list this layer")
        elif name not in ours:
            yield Discrepancy(Catcher.MANIFEST, name, "the manifest lists this layer; the files hold none of that name")
        else:
            mine, said = (ours[name].converted, ours[name].shape), (theirs[name].converted, theirs[name].shape)
            if mine != said:
                why = f"the manifest says converted={said[0]}, shape {said[1]}; the files {mine[0]}, {mine[1]}"
                yield Discrepancy(Catcher.MANIFEST, name, why)


def compare_files(root: Path, source: Path, names: Iterable[Path], expected: Iterable[Path]) -> Iterator[Discrepancy]:
    """Files that travel with weights: the same ones, byte for byte.

    Args:
        root: the export.
        source: its parent.
        names: those in the export, relative.
        expected: those in the parent, relative.
    """
    there, wanted = set(names), set(expected)
    for name in sorted(there | wanted):
        if name not in wanted:
            yield Discrepancy(Catcher.PARITY, str(name), "the parent holds no such file")
        elif name not in there:
            yield Discrepancy(Catcher.PARITY, str(name), "it is missing; the parent holds it")
        elif not filecmp.cmp(root / name, source / name, shallow=False):
            yield Discrepancy(Catcher.PARITY, str(name), "its bytes are not those of the parent's")
