"""What a vLLM export may be asked for: one frozen model, written whole into the export's manifest."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from fp8pipe.core.config import CONFIG_ONLY, Flag, FrozenConfig, Size


class ExportFormat(StrEnum):
    """How the linear layers of the export are stored and run.

    `fp8`: E4M3 weights, one scale per row, activations quantized per token at run time (W8A8).
    `w8a16`: the same weights; activations stay in the model's dtype.
    `bf16`: no quantization; FP8 weights are dequantized and rounded once to bf16.
    """

    FP8 = "fp8"
    W8A16 = "w8a16"
    BF16 = "bf16"

    @property
    def quantized(self) -> bool:
        """Whether linear weights are stored as FP8 codes."""
        return self is not ExportFormat.BF16


class VllmExportOptions(FrozenConfig):
    """Options of one export.

    Raises:
        pydantic.ValidationError: an unknown key or a value out of range (the command line turns it into a
            ConfigurationError).
    """

    format: ExportFormat = Field(
        default=ExportFormat.FP8,
        description="fp8 (W8A8, per-row scales), w8a16 (weight-only FP8) or bf16 (dequantized)",
    )
    max_shard_bytes: Annotated[Size, Flag("max-shard-size")] = Field(
        default=5_000_000_000,
        description="Most tensor data in one file, for instance 5GB; a larger tensor gets its own",
    )
    vllm_version: str = Field(
        default="0.32.0", description="vLLM version whose checkpoint schema is written (one of the declared versions)"
    )
    force: Annotated[bool, CONFIG_ONLY] = Field(default=False, description="Replace an existing output directory")
