"""The record of a validation in ONNX Runtime: what was compared with what, and the verdict."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from exporters.graph.classes import ClassAgreement
from exporters.graph.kernels import KernelReport
from exporters.graph.parity import LayerParity
from fp8pipe.artifact import Gate
from fp8pipe.core.config import FrozenConfig

__all__ = ["RECORD_VERSION", "OnnxValidationRecord"]

# 2: a checksum lies beside the record. 3: CONSISTENT, what is not proved, and pictures beside the probe images.
RECORD_VERSION = 3


class OnnxValidationRecord(FrozenConfig):
    """One validation."""

    schema_version: int = Field(default=RECORD_VERSION, description="version of this schema")
    created: str = Field(description="UTC time, ISO 8601")
    export: str = Field(description="name of the export's directory")
    manifest_digest: str = Field(description="digest of the export's manifest when it was validated")
    engine: str = Field(description="the engine's name")
    versions: dict[str, str] = Field(description="versions of the packages that took part")
    reference: Literal["artifact", "export"] = Field(
        description="what it was compared with: the artifact in torch, or the graph's own codes, every operator plain"
    )
    layers: list[LayerParity] = Field(
        description="every product, fed the same input on both sides; none for exact formats, compared whole"
    )
    kernels: KernelReport = Field(description="which operator runs each product")
    classes: ClassAgreement = Field(description="the whole net, on the probe images")
    pictures: ClassAgreement | None = Field(description="the whole net on pictures; none where none were given")
    gates: list[Gate] = Field(description="the comparisons with their thresholds")
    load_s: float = Field(ge=0, description="time to load the engine, seconds")
    reasons: list[str] = Field(description="why it was rejected; empty when accepted")
    not_proved: list[str] = Field(description="what the verdict does not say, and why")
    verdict: Literal["ACCEPT", "CONSISTENT", "REJECT"] = Field(
        description="CONSISTENT: the engine computes what the file says; the artifact was not at hand"
    )
