"""Validation of a language model's TensorRT export without running its engines: files, graph and precisions.

The inputs of these engines are token ids and a key/value cache instead of pixels, so the GPU comparison for vision
models cannot be used. The engines are not executed, and the record says so.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from exporters.graph.formats import MODEL_FILE
from exporters.graph.runtime import import_onnx_package
from exporters.tensorrt.language.predict import decoder_session
from exporters.tensorrt.language.target import KIND, TrtLanguageDetails, product_precision
from exporters.tensorrt.lint import lint_file
from exporters.tensorrt.target import Base, BuiltEngine, TrtFormat
from fp8pipe.artifact import Artifact, Gate, installed_versions, open_artifact
from fp8pipe.artifact.record import remove_record
from validation.contents import contents_gate
from validation.tensorrt.record import EngineReport, TrtValidationRecord, conclude

_TOKENS = (2, 16)  # number of sequences, and of token ids per sequence
_VERSIONS = ("onnx", "onnx-ir", "onnxruntime", "tensorrt-rtx")


def validate_language(export: Path) -> TrtValidationRecord:
    """Validate a language model's TensorRT export and write `<export>.validation.json` next to it.

    Returns:
        The record, with the verdict PROVED-WITHOUT-RUNNING.

    Raises:
        BadArtifactError: a file is damaged, or ONNX Runtime rejects the graph.
        ExportRejectedError: the verdict is REJECT; the record is written, named in the message, and attached.
    """
    import_onnx_package("onnxruntime")
    artifact = open_artifact(export, kind=KIND)  # checks every file against the manifest, engines too
    remove_record(artifact.root)  # if anything fails from here on, no old verdict remains
    details = artifact.manifest.details_of(TrtLanguageDetails)
    engines, version = details.engines, artifact.manifest.versions.get("tensorrt-rtx", "")
    stated, unchecked = contents_gate(artifact, None)
    gates = (_finite(artifact, details), _lint(artifact, tuple(engines)), stated,
             *(_precision(details, capability, entry) for capability, entry in engines.items()))  # fmt: skip
    reports = (
        EngineReport(
            capability=capability, builder="rtx", version=version, source="export", reasons=(),
            precisions=entry.precisions,
        )
        for capability, entry in engines.items()
    )  # fmt: skip
    installed = installed_versions(("tensorrt-rtx",))["tensorrt-rtx"]
    stale = (
        [f"that engines of version {version} load: version {installed} is installed"] if installed != version else []
    )
    passed = len(artifact.manifest.gates)
    return conclude(
        artifact, details.format, gates, reports, packages=_VERSIONS,
        proved=(f"every file, including engines, has the manifest's digest; its export passed {passed} gates",
                "ONNX Runtime reads and runs the graph, and the linter finds nothing"),
        not_proved=("execution: fp8pipe does not run engines of language models", "timing: no speed was measured",
                    "that the graph holds what was exported: `fp8pipe verify` compares it with the parent",
                    *stale, *unchecked),
    )  # fmt: skip


def _finite(artifact: Artifact, details: TrtLanguageDetails) -> Gate:
    """A gate that requires all logits to be finite when the graph runs in ONNX Runtime."""
    session = decoder_session(artifact.root / MODEL_FILE, details.cache, Base(details.base))
    logits = session.logits(torch.arange(_TOKENS[0] * _TOKENS[1]).view(_TOKENS) + 1)
    bad = int((~np.isfinite(logits)).sum())
    detail = f"of {logits.size} logits of the graph in ONNX Runtime, {_TOKENS[0]} sequences of {_TOKENS[1]} tokens"
    return Gate(name="outputs that are no numbers", value=bad, detail=detail)


def _lint(artifact: Artifact, capabilities: tuple[str, ...]) -> Gate:
    errors = lint_file(artifact.root / MODEL_FILE, capabilities).errors()
    rules = ", ".join(sorted({finding.rule for finding in errors}))
    return Gate(name="findings of the linter", value=len(errors), detail=rules)


def _precision(details: TrtLanguageDetails, capability: str, entry: BuiltEngine) -> Gate:
    counts, wanted = entry.precisions, product_precision(TrtFormat(details.format), Base(details.base))
    other = sum(count for name, count in counts.items() if name != wanted)
    return Gate(
        name=f"linear products not in {wanted} for {capability}", value=other,
        detail=", ".join(f"{count} in {name}" for name, count in sorted(counts.items())),
    )  # fmt: skip
