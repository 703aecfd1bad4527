"""Settings of `bench` and `serve-check`, and the record of a measurement.

A record has named figures with units, the machine and date of the measurement, and what was not measured.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, field_validator

from exporters.vllm.form import ServingForm
from fp8pipe.artifact import Artifact, Gate, installed_versions
from fp8pipe.artifact.gate import failures
from fp8pipe.artifact.record import write_record
from fp8pipe.core.config import Flag, FrozenConfig
from fp8pipe.core.devices import DEVICE_HELP, DeviceName
from fp8pipe.core.machine import describe_machine

RECORD_VERSION = 1
Stage = Literal["bench", "serve-check", "evaluate"]


class Figure(FrozenConfig):
    """One measured value."""

    what: str = Field(description="what was measured, in words")
    name: str = Field(description="key in `figures`")
    value: float = Field(description="measured value")
    unit: str = Field(description="unit; empty for a ratio or a count")
    detail: str = Field(default="", description="how it was measured, in words")


def figure(what: str, name: str, value: float, unit: str = "", detail: str = "") -> Figure:
    """Create a `Figure` from positional arguments."""
    return Figure(what=what, name=name, value=value, unit=unit, detail=detail)


class MeasureRecord(FrozenConfig):
    """The record of one measurement."""

    schema_version: int = Field(default=RECORD_VERSION, description="version of this schema")
    stage: Stage = Field(description="bench, serve-check or evaluate")
    date: str = Field(description="UTC time, ISO 8601")
    export: str = Field(description="name of the export's directory")
    manifest_digest: str = Field(description="digest of the export's manifest when it was measured")
    machine: dict[str, Any] = Field(description="processor, cores, memory, system")
    versions: dict[str, str] = Field(description="versions of the packages involved")
    settings: dict[str, Any] = Field(description="the resolved settings")
    rows: list[Figure] = Field(description="the figures, in order")
    figures: dict[str, float] = Field(description="the same figures by name, for gates")
    not_measured: list[str] = Field(default_factory=list, description="what was not measured, and why")
    gates: list[Gate] = Field(default_factory=list, description="comparisons with their thresholds")
    reasons: list[str] = Field(default_factory=list, description="why it was rejected; empty when accepted")
    verdict: Literal["ACCEPT", "REJECT"] = Field(description="REJECT if a gate failed")


M = TypeVar("M", bound=MeasureRecord)


def measure_path(export: Path, stage: Stage) -> Path:
    """`<export>.bench.json`, and so on by stage, next to the export."""
    absolute = Path(os.path.abspath(export))
    return absolute.with_name(f"{absolute.name}.{stage}.json")


def write_measure(
    artifact: Artifact, stage: Stage, settings: FrozenConfig, rows: Sequence[Figure], *, packages: Sequence[str],
    gates: Sequence[Gate] = (), not_measured: Sequence[str] = (), versions: Mapping[str, str] | None = None,
    kind: type[M] = MeasureRecord, **more: Any,  # type: ignore[assignment]
) -> M:  # fmt: skip
    """Create the record of a measurement and write it next to the export, atomically.

    Args:
        artifact: the export.
        stage: the command that measured.
        settings: the resolved settings.
        rows: the measured values.
        packages: distributions of this environment whose versions are recorded.
        gates: comparisons; the verdict is REJECT if one failed.
        not_measured: what was not measured, and why.
        versions: further versions, for example those of vLLM's environment.
        kind: class of the record.
        more: fields that this class adds.

    Raises:
        OutOfMemoryError: the disk is full.
    """
    failed = failures(gates)
    record = kind(
        stage=stage, date=datetime.now(UTC).isoformat(timespec="seconds"), export=artifact.root.absolute().name,
        manifest_digest=artifact.digest, machine=describe_machine(),
        versions={**installed_versions(packages), **(versions or {})},
        settings=settings.model_dump(mode="json"), rows=list(rows), figures={row.name: row.value for row in rows},
        not_measured=list(not_measured), gates=list(gates), reasons=failed, verdict="REJECT" if failed else "ACCEPT",
        **more,
    )  # fmt: skip
    write_record(record, artifact.root, place=measure_path(artifact.root, stage))
    return record


class BenchConfig(FrozenConfig):
    """Settings of `bench`."""

    batches: Annotated[tuple[int, ...], Flag("batch")] = Field(
        (1, 8), min_length=1, description="Vision: batch size; repeatable"
    )
    rounds: int = Field(
        20, ge=3, description="Vision: calls per graph and batch size; language: requests sent one at a time"
    )
    threads: Annotated[int | None, Flag(default="the runtime's choice")] = Field(
        None, ge=1, description="Vision: threads per operator"
    )
    concurrency: int = Field(4, ge=1, description="Language: concurrent requests in the throughput measurement")
    tokens: int = Field(32, ge=2, description="Language: tokens per answer")
    device: DeviceName = Field("auto", description=DEVICE_HELP)

    @field_validator("batches")
    @classmethod
    def _positive(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if any(size < 1 for size in value):
            raise ValueError("every batch size must be at least 1")
        return tuple(dict.fromkeys(value))


class ServeCheckConfig(ServingForm):
    """Settings of `serve-check`; for a language export also vLLM's serving options."""

    images: int = Field(8, ge=1, description="Vision: number of images to send")
    prompts: Annotated[tuple[str, ...], Flag("prompt", default="two built-in questions")] = Field(
        ("What is the capital of France?", "Name a colour."), min_length=1,
        description="Language: a question to ask; repeatable",
    )  # fmt: skip
    tokens: int = Field(24, ge=1, description="Language: largest number of tokens in an answer")
    ready_s: float = Field(600.0, gt=0, description="Longest wait until the service is ready, seconds")
