"""The record of a TensorRT validation: what was proved, what was not (for example without a GPU), and the verdict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import Field

from exporters.graph.formats import MODEL_FILE
from fp8pipe.artifact import Artifact, Gate, installed_versions, sha256_file
from fp8pipe.artifact.gate import failures
from fp8pipe.core.config import FrozenConfig
from validation.record import EngineRecord, concluded, heading

Verdict = Literal["ACCEPT", "PROVED-WITHOUT-RUNNING", "CONSISTENT", "REJECT"]


class EngineReport(FrozenConfig):
    """An engine for one compute capability: its origin, and the precisions of its matrix multiplications."""

    capability: str = Field(description="compute capability that it was built for")
    builder: str = Field(description="rtx or enterprise")
    version: str = Field(description="version of the builder")
    source: Literal["export", "cache", "built"] = Field(
        description="where it came from: the export, the cache, or built for this validation"
    )
    reasons: tuple[str, ...] = Field(description="why the export's own engine could not be used; empty if it was")
    precisions: dict[str, int] = Field(description="number of matrix multiplications by precision")
    read: bool = Field(
        default=False, description="true if precisions were read from the engine, false if the builder listed them"
    )


class Timing(FrozenConfig):
    """GPU time for one batch size, without copies to and from the device."""

    batch: int = Field(gt=0, description="batch size")
    engine_ms: float = Field(gt=0, description="median time of the engine, milliseconds")
    fp16_ms: float = Field(gt=0, description="median time of an FP16 engine of the same weights, milliseconds")


class Execution(FrozenConfig):
    """Results of running the engine on a GPU."""

    device: str = Field(description="name of the GPU")
    images: int = Field(gt=0, description="number of images compared")
    relative_error: float = Field(description="norm of the difference from ONNX Runtime's outputs, over their norm")
    same_class: float | None = Field(
        description="share of images with the same largest output; none if outputs are not ranked"
    )
    timings: tuple[Timing, ...] = Field(description="times by batch size")


class TrtValidationRecord(EngineRecord):
    """The record of one validation."""

    # Version 3 added the verdict CONSISTENT, `reference`, and precisions read from the engine.
    schema_version: int = Field(default=3, description="version of this schema")
    engine: Literal["tensorrt"] = Field(default="tensorrt", description="the engine's name")
    versions: dict[str, str] = Field(description="versions of the packages involved")
    graph_sha256: str = Field(description="digest of the graph, as in the manifest")
    format: str = Field(description="number format of the matrix multiplications")
    engines: tuple[EngineReport, ...] = Field(description="engines that were examined")
    reference: Literal["artifact", "export"] = Field(
        default="export", description="what the graph was compared with: the artifact's model, or only itself"
    )
    execution: Execution | None = Field(description="results on the GPU; none without one")
    proved: tuple[str, ...] = Field(description="what holds, in words")
    not_proved: tuple[str, ...] = Field(description="what was not tested, and why; empty on a GPU")
    gates: tuple[Gate, ...] = Field(description="comparisons with their thresholds")
    reasons: tuple[str, ...] = Field(description="why it was rejected; empty otherwise")
    verdict: Verdict = Field(
        description="PROVED-WITHOUT-RUNNING: every check passed, but no engine was run; CONSISTENT: the "
        "graph was not compared with the artifact"
    )


def conclude(
    artifact: Artifact, format: str, gates: Sequence[Gate], engines: Iterable[EngineReport], *,
    packages: Sequence[str], proved: Sequence[str], not_proved: Sequence[str], execution: Execution | None = None,
    compared: bool | None = None,
) -> TrtValidationRecord:  # fmt: skip
    """Derive the verdict from the gates and write the record next to the export.

    Args:
        artifact: the export.
        format: number format of the matrix multiplications.
        gates: all comparisons.
        engines: the engines that were examined.
        packages: distributions whose versions are recorded.
        proved: sentences on what was proved.
        not_proved: sentences on what was not tested, and why.
        execution: results of running an engine on a GPU; None if none was run.
        compared: whether the graph was compared with the artifact; None for kinds that are never compared with it.

    Raises:
        ExportRejectedError: a gate failed.
    """
    reasons = tuple(failures(gates))
    accepted: Verdict = "ACCEPT" if execution is not None else "PROVED-WITHOUT-RUNNING"
    accepted = "CONSISTENT" if compared is False else accepted
    record = TrtValidationRecord(
        **heading(artifact), versions=installed_versions(packages),
        graph_sha256=sha256_file(artifact.root / MODEL_FILE), format=format, engines=tuple(engines),
        execution=execution, proved=tuple(proved), not_proved=tuple(not_proved), gates=tuple(gates), reasons=reasons,
        verdict="REJECT" if reasons else accepted, reference="artifact" if compared else "export",
    )  # fmt: skip
    return concluded(record, artifact, reasons, f"TensorRT does not compute what {artifact.root} holds")
