"""What an ONNX export may be asked for: one frozen model, written whole into the export's manifest."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from exporters.graph.formats import OnnxFormat
from fp8pipe.core.config import CONFIG_ONLY, FrozenConfig


class OnnxExportOptions(FrozenConfig):
    """Options of one export."""

    format: OnnxFormat = Field(
        default=OnnxFormat.QDQ,
        description="qdq (weights and activations as trained), qdq-exact (in arithmetic that has one result) or "
        "int4-weight-only (float activations)",
    )
    force: Annotated[bool, CONFIG_ONLY] = Field(default=False, description="Replace an existing output directory")
