"""The record of a validation: what was compared, in which engine, and the verdict; written beside the export.

It names the manifest's digest: a record says nothing about an export that has changed since.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fp8pipe.artifact.record import ExportRejectedError, record_path, remove_record, write_record
from fp8pipe.core.config import FrozenConfig

__all__ = [
    "CanaryAnswer",
    "ExportRejectedError",
    "LogprobReport",
    "ValidationRecord",
    "WeightReport",
    "record_path",
    "remove_record",
    "write_record",
]

# 2: a checksum lies beside the record.
RECORD_VERSION = 2
Verdict = Literal["ACCEPT", "REJECT"]


class WeightReport(FrozenConfig):
    """Weights read back from inside the engine, against what they should be."""

    reference: Literal["export", "source"] = Field(description="where the expected values came from")
    layers: int = Field(ge=0, description="layers stored as FP8 codes that were compared")
    tensors: int = Field(ge=0, description="tensors compared, FP8 or not")
    elements: int = Field(ge=0, description="elements of those tensors")
    differing: int = Field(ge=0, description="elements whose fp32 bits differ")
    differing_codes: int = Field(ge=0, description="elements that quantize to another FP8 code")
    different: list[str] = Field(description="names of tensors that differ")
    missing: list[str] = Field(description="names of tensors that the engine does not hold")
    gemm_differs: list[str] = Field(description="tensors that the engine holds right and multiplies wrong")
    read: dict[str, int] = Field(
        description="tensors by how they were read: as stored, from codes, or through the GEMM (sign of zero lost)"
    )

    @property
    def failures(self) -> list[str]:
        """What is wrong, in sentences."""
        found = []
        if self.differing or self.different:
            found.append(
                f"{self.differing} of {self.elements} weights differ ({self.differing_codes} FP8 codes), "
                f"the first in {self.different[0]}"
            )
        if self.missing:
            found.append(f"the engine holds no {self.missing[0]} ({len(self.missing)} tensor(s) missing)")
        if self.gemm_differs:
            found.append(f"the engine's GEMM disagrees with its own weight in {self.gemm_differs[0]}")
        return found


class LogprobReport(FrozenConfig):
    """Teacher-forced log-probabilities: the engine's against the torch model's, both in fp32."""

    tokens: int = Field(ge=0, description="tokens scored")
    max_abs_diff: float = Field(description="largest absolute difference, nats; NaN if any value is not finite")
    mean_abs_diff: float = Field(description="mean absolute difference, nats")
    threshold: float = Field(gt=0, description="largest difference accepted, nats")
    mean_logprob: float = Field(description="mean of the engine's log-probabilities, nats a token")

    @property
    def failures(self) -> list[str]:
        """What is wrong, in sentences."""
        if self.tokens and self.max_abs_diff <= self.threshold:  # NaN fails
            return []
        return [
            f"log-probabilities differ by up to {self.max_abs_diff:g} nats over {self.tokens} tokens "
            f"(accepted: {self.threshold:g})"
        ]


class CanaryAnswer(FrozenConfig):
    """One question put to the engine."""

    prompt: str = Field(description="the question")
    answer: str = Field(description="the engine's greedy answer")
    tokens: int = Field(ge=0, description="tokens of the answer")
    agreeing_tokens: int = Field(ge=0, description="leading tokens that are the torch model's greedy choice too")
    verdict: Literal["ok", "empty", "degenerate", "prompt-differs", "differs"] = Field(
        description="ok; no text; one token over and over; another prompt than the tokenizer's; another answer"
    )


class ValidationRecord(FrozenConfig):
    """One validation."""

    schema_version: int = Field(default=RECORD_VERSION, description="version of this schema")
    created: str = Field(description="UTC time, ISO 8601")
    export: str = Field(description="name of the export's directory")
    manifest_digest: str = Field(description="digest of the export's manifest when it was validated")
    engine: str = Field(description="the engine's name")
    dtype: str = Field(description="the engine's compute dtype during the validation")
    versions: dict[str, str] = Field(description="versions of the engine's packages")
    weights: WeightReport = Field(description="weights read back")
    logprobs: LogprobReport = Field(description="log-probabilities")
    canary: list[CanaryAnswer] = Field(description="questions and answers")
    chat_template: bool = Field(description="whether the questions went through the export's chat template")
    load_s: float = Field(ge=0, description="time to load the engine, seconds")
    peak_rss_bytes: int = Field(ge=0, description="largest resident memory of the engine, bytes")
    reasons: list[str] = Field(description="why it was rejected; empty when accepted")
    verdict: Verdict = Field(description="ACCEPT or REJECT")
