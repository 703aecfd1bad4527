"""The record of a validation for TensorRT: what was proved, what was not for want of a GPU, and the verdict."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fp8pipe.artifact import Artifact, Gate
from fp8pipe.artifact.record import ExportRejectedError, write_record
from fp8pipe.core.config import FrozenConfig

__all__ = ["RECORD_VERSION", "EngineReport", "Execution", "Timing", "TrtValidationRecord", "Verdict", "concluded"]

# 2: a checksum lies beside the record. 3: CONSISTENT, the reference, and precisions that are read from the engine.
RECORD_VERSION = 3
Verdict = Literal["ACCEPT", "PROVED-WITHOUT-RUNNING", "CONSISTENT", "REJECT"]


class EngineReport(FrozenConfig):
    """One engine that fits its GPU."""

    capability: str = Field(description="compute capability it is for")
    builder: str = Field(description="rtx or enterprise")
    version: str = Field(description="of the builder")
    source: Literal["export", "cache", "built"] = Field(description="whether it is the export's own")
    reasons: tuple[str, ...] = Field(description="why the export's own does not serve; empty when it does")
    precisions: dict[str, int] = Field(description="products by the precision they are multiplied in")
    read: bool = Field(default=False, description="whether that was read from the engine, or is what a builder listed")


class Timing(FrozenConfig):
    """One batch size, on the device; copies to and from it are not counted."""

    batch: int = Field(gt=0, description="images at once")
    engine_ms: float = Field(gt=0, description="median time of the engine, milliseconds")
    fp16_ms: float = Field(gt=0, description="median time of an FP16 engine of the same weights, milliseconds")


class Execution(FrozenConfig):
    """The engine run on a GPU."""

    device: str = Field(description="name of the GPU")
    images: int = Field(gt=0, description="how many were compared")
    relative_error: float = Field(description="norm of the difference to ONNX Runtime, over the norm of its outputs")
    same_class: float | None = Field(description="share of images with the same largest output; none of a backbone")
    timings: tuple[Timing, ...] = Field(description="by batch size")


class TrtValidationRecord(FrozenConfig):
    """One validation."""

    schema_version: int = Field(default=RECORD_VERSION, description="version of this schema")
    created: str = Field(description="UTC time, ISO 8601")
    export: str = Field(description="name of the export's directory")
    manifest_digest: str = Field(description="digest of the export's manifest when it was validated")
    engine: Literal["tensorrt"] = Field(default="tensorrt", description="the engine's name")
    versions: dict[str, str] = Field(description="versions of the packages that took part")
    graph_sha256: str = Field(description="digest of the graph, as in the manifest")
    format: str = Field(description="the number format of the products")
    engines: tuple[EngineReport, ...] = Field(description="engines that were looked at")
    reference: Literal["artifact", "export"] = Field(
        default="export", description="what the graph was compared with: the artifact's model, or nothing else"
    )
    execution: Execution | None = Field(description="none where no GPU is")
    proved: tuple[str, ...] = Field(description="what holds, in words")
    not_proved: tuple[str, ...] = Field(description="what was not tried, and why; empty on a GPU")
    gates: tuple[Gate, ...] = Field(description="comparisons with their thresholds")
    reasons: tuple[str, ...] = Field(description="why it was rejected; empty otherwise")
    verdict: Verdict = Field(
        description="PROVED-WITHOUT-RUNNING: nothing speaks against it, and no engine was executed; CONSISTENT: the "
        "graph was not compared with the artifact"
    )


def concluded(record: TrtValidationRecord, artifact: Artifact) -> TrtValidationRecord:
    """Written beside the export; an error where it rejects."""
    path = write_record(record, artifact.root)
    if record.verdict == "REJECT":
        raise ExportRejectedError(
            f"{artifact.root} does not hold in TensorRT",
            why="; ".join(record.reasons),
            fix=f"do not deploy it; the figures are in {path}",
            record=record,
        )
    return record
