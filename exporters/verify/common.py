"""Helpers that the checks of all kinds of artifacts share; each yields a `Finding` for every difference."""

from __future__ import annotations

import filecmp
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fp8pipe.artifact import MANIFEST_NAME, Artifact, Encoding, Gate, LayerRecord, Manifest
from fp8pipe.artifact.finding import Check, Finding
from fp8pipe.artifact.kinds import Details
from fp8pipe.artifact.manifest import ENCODINGS_SINCE


def lint_findings(findings: Iterable[Finding]) -> Iterator[Finding]:
    """Convert a linter's findings to findings of the check `lint`, with the rule in brackets."""
    for found in findings:
        yield Finding(Check.LINT, found.where, f"{found.why} ({found.rule})")


def failed_gates(gates: Sequence[Gate]) -> Iterator[Finding]:
    """Findings for gates that were evaluated again and now fail."""
    for gate in gates:
        if not gate.passed:
            yield Finding(Check.PARITY, gate.name, f"{gate.numbers}; {gate.detail}")


def compare_gates(artifact: Artifact, again: Sequence[Gate]) -> Iterator[Finding]:
    """Compare the manifest's gates with gates that were evaluated again and depend only on the files."""
    recorded = {gate.name: gate for gate in artifact.manifest.gates}
    for gate in again:
        old = recorded.get(gate.name)
        if old is None:
            yield Finding(Check.MANIFEST, f"gate {gate.name}", "the manifest does not list this gate")
            continue
        judged = [(one.comparison, one.threshold, one.passed) for one in (old, gate)]
        if judged[0] != judged[1] or not _close(old.value, gate.value):
            why = f"the manifest says {old.numbers}; evaluated again, it is {gate.numbers}"
            yield Finding(Check.MANIFEST, f"gate {gate.name}", why)


def _close(recorded: float | None, again: float | None) -> bool:
    """Whether two values of a gate agree: counts exactly, others up to 0.1 %, as their sums may round differently."""
    if recorded is None or again is None:
        return recorded is again
    return recorded == again or (not float(again).is_integer() and math.isclose(recorded, again, rel_tol=1e-3))


def compare_json(found: Any, expected: Any, where: str, path: str = "") -> Iterator[Finding]:
    """Compare two JSON values, and yield a finding for every leaf that differs.

    Findings are located at `where`, usually a file name, and name the leaf's path. `path` is where both values lie in
    the document. Lists of strings are compared without regard to order.
    """
    if isinstance(found, dict) and isinstance(expected, dict):
        for key in sorted(found.keys() | expected.keys()):
            inner = f"{path}.{key}" if path else str(key)
            if key not in found:
                yield Finding(Check.MANIFEST, where, f"{inner} is missing; expected {_short(expected[key])}")
            elif key not in expected:
                yield Finding(Check.MANIFEST, where, f"{inner} is {_short(found[key])}; expected no such key")
            else:
                yield from compare_json(found[key], expected[key], where, inner)
    elif isinstance(found, list) and isinstance(expected, list) and all(isinstance(x, str) for x in found + expected):
        for name in sorted(set(found) ^ set(expected)):
            why = "must not be there" if name in found else "is missing"
            yield Finding(Check.MANIFEST, where, f"{path}: {name} {why}")
        if sorted(found) != sorted(expected) and set(found) == set(expected):
            yield Finding(Check.MANIFEST, where, f"{path} names something twice")
    elif found != expected:
        why = f"{path or 'its content'} is {_short(found)}; expected {_short(expected)}"
        yield Finding(Check.MANIFEST, where, why)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def compare_layers(manifest: Manifest, expected: Sequence[LayerRecord]) -> Iterator[Finding]:
    """Compare the manifest's layer records with those derived from the files; reasons are free text, not compared."""
    ours, theirs = ({layer.name: layer for layer in layers} for layers in (expected, manifest.layers))
    for name in sorted(ours.keys() | theirs.keys()):
        if name not in theirs:
            yield Finding(Check.MANIFEST, name, "the manifest does not list this layer")
        elif name not in ours:
            yield Finding(Check.MANIFEST, name, "the manifest lists this layer; the files have no layer of that name")
        else:
            said, files = theirs[name], ours[name]
            yield from compare_encodings(manifest, name, "weight", said.weight, files.weight)
            yield from compare_encodings(manifest, name, "activation", said.activation, files.activation)
            if said.shape != files.shape:
                yield Finding(
                    Check.MANIFEST, name, f"the manifest says shape {said.shape}; in the files it is {files.shape}"
                )


def compare_encodings(
    manifest: Manifest, name: str, what: str, said: Encoding | None, found: Encoding | None
) -> Iterator[Finding]:
    """Compare the encoding that the manifest records for a layer's weight or activation with the one in the files.

    Manifests older than `ENCODINGS_SINCE` recorded neither activations nor scale rules, and not always the bits.
    """
    if manifest.stored_version < ENCODINGS_SINCE:
        if what == "activation":
            return
        unrecorded = {"scale_rule": None} | ({"bits": None} if said is not None and said.bits is None else {})
        said, found = (one and one.model_copy(update=unrecorded) for one in (said, found))
    if said != found:
        why = f"the manifest says {what} {said or 'float'}; the files hold {found or 'float'}"
        yield Finding(Check.MANIFEST, name, why)


def compare_details(artifact: Artifact, expected: Details, unknown: frozenset[str] = frozenset()) -> Iterator[Finding]:
    """Compare the manifest's details with those derived from the files.

    Only the fields that are set in `expected` and not named in `unknown` are compared.
    """
    if artifact.manifest.stored_version < ENCODINGS_SINCE:
        unknown |= {"trained_activations"}  # older manifests stored it as text, which is incomplete
    known = expected.model_fields_set - unknown
    said, facts = (one.model_dump(mode="json", include=known) for one in (artifact.manifest.details, expected))
    yield from compare_json(said, facts, MANIFEST_NAME, "details")


def compare_files(root: Path, source: Path, names: Iterable[Path], expected: Iterable[Path]) -> Iterator[Finding]:
    """Compare files that an export copies from its parent, byte for byte.

    Args:
        root: directory of the export.
        source: directory of the parent.
        names: the copied files that the export has.
        expected: the files that it should have, since the parent has them.
    """
    there, wanted = set(names), set(expected)
    for name in sorted(there | wanted):
        if name not in wanted:
            yield Finding(Check.PARITY, str(name), "the parent has no such file")
        elif name not in there:
            yield Finding(Check.PARITY, str(name), "missing; the parent has it")
        elif not filecmp.cmp(root / name, source / name, shallow=False):
            yield Finding(Check.PARITY, str(name), "its bytes differ from the parent's")
