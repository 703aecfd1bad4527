"""What can be proved of a language model's export for TensorRT without running its engine: files, graph, precisions.

Its engines take token ids and a cache instead of pixels, so the comparison on a GPU that vision models get does not fit
them, and none is made: a record says so.
"""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import torch

from exporters.tensorrt.engines import MODEL_FILE
from exporters.tensorrt.language.serve import DecoderSession
from exporters.tensorrt.lint import lint_file
from exporters.tensorrt.options import Base
from fp8pipe.artifact import Artifact, Gate, installed_versions, open_artifact, sha256_file
from validation.tensorrt.record import EngineReport, TrtValidationRecord

__all__ = ["is_language_export", "prove_language"]

_TOKENS = (2, 16)  # sequences, and ids of each
_VERSIONS = ("onnx", "onnx-ir", "onnxruntime", "tensorrt-rtx")


def is_language_export(artifact: Artifact) -> bool:
    """Whether the export is of a language model."""
    return artifact.kind == "trt-export" and "cache" in artifact.manifest.extra


def prove_language(artifact: Artifact) -> TrtValidationRecord:
    """The record of a language export; its verdict is PROVED-WITHOUT-RUNNING, or REJECT.

    Args:
        artifact: the export; every file is compared with the manifest, engines too.

    Raises:
        BadArtifactError: a file is damaged, or ONNX Runtime refuses the graph.
    """
    artifact = open_artifact(artifact.root)
    engines = artifact.manifest.extra["engines"]
    gates = (_finite(artifact), _lint(artifact, tuple(engines)), *(_precision(c, e) for c, e in engines.items()))
    reasons = tuple(f"{g.name}: {g.value:g} against {g.threshold:g} ({g.detail})" for g in gates if not g.passed)
    version = artifact.manifest.versions.get("tensorrt-rtx", "")
    return TrtValidationRecord(
        created=datetime.now(UTC).isoformat(timespec="seconds"), export=artifact.root.absolute().name,
        manifest_digest=artifact.digest, versions=installed_versions(_VERSIONS),
        graph_sha256=sha256_file(artifact.root / MODEL_FILE), format=artifact.manifest.extra["format"],
        engines=tuple(
            EngineReport(
                capability=capability, builder="rtx", version=version, source="export", reasons=(),
                precisions=entry["precisions"],
            )
            for capability, entry in engines.items()
        ),
        execution=None, proved=_proved(artifact), not_proved=_not_proved(version), gates=gates, reasons=reasons,
        verdict="REJECT" if reasons else "PROVED-WITHOUT-RUNNING",
    )  # fmt: skip


def _finite(artifact: Artifact) -> Gate:
    """The graph runs in ONNX Runtime, and gives numbers."""
    extra = artifact.manifest.extra
    cache = extra["cache"]
    shape = None if cache is None else (cache["layers"], cache["heads"], cache["size"])
    session = DecoderSession(artifact.root / MODEL_FILE, shape, Base(extra["base"]))
    logits = session.logits(torch.arange(_TOKENS[0] * _TOKENS[1]).view(_TOKENS) + 1)
    bad = int((~np.isfinite(logits)).sum())
    detail = f"of {logits.size} logits of the graph in ONNX Runtime, {_TOKENS[0]} sequences of {_TOKENS[1]} tokens"
    return Gate(name="outputs that are no numbers", value=bad, threshold=0, passed=bad == 0, detail=detail)


def _lint(artifact: Artifact, capabilities: tuple[str, ...]) -> Gate:
    errors = lint_file(artifact.root / MODEL_FILE, capabilities).errors()
    rules = ", ".join(sorted({finding.rule for finding in errors}))
    return Gate(name="findings of the linter", value=len(errors), threshold=0, passed=not errors, detail=rules)


def _precision(capability: str, entry: dict[str, object]) -> Gate:
    counts = entry["precisions"]
    assert isinstance(counts, dict)
    other = sum(count for name, count in counts.items() if name != "fp8")
    return Gate(
        name=f"linear products not in fp8 for {capability}", value=other, threshold=0, passed=other == 0,
        detail=", ".join(f"{count} in {name}" for name, count in sorted(counts.items())),
    )  # fmt: skip


def _proved(artifact: Artifact) -> tuple[str, ...]:
    count = len(artifact.manifest.gates)
    return (
        f"every file, engines too, has the manifest's digest; {count} gates of the export passed on them",
        "ONNX Runtime reads and runs the graph, and the linter finds nothing",
    )


def _not_proved(version: str) -> tuple[str, ...]:
    installed = installed_versions(("tensorrt-rtx",))["tensorrt-rtx"]
    stale = [f"that engines of {version} load: {installed} is installed"] if installed != version else []
    return ("execution: engines of language models are not run here", "timing: no speed was measured", *stale)
