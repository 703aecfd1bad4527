"""The configuration of a fine-tuning of a few steps, for tiny models."""

from __future__ import annotations

from typing import Any

from fp8pipe.core.config import build_config
from pipeline.finetune.config import FinetuneConfig

__all__ = ["config"]


def config(base: Any, data: Any, **changes: object) -> FinetuneConfig:
    """Six steps of rank 8 on rows of 64 tokens; `changes` win."""
    values = {
        "model": str(base), "data": str(data), "rank": 8, "steps": 6, "batch_size": 2, "sequence_length": 64,
        "learning_rate": 1e-2, "warmup_steps": 1, "log_every": 2, "evaluate_every": 3, "save_every": 2,
        "final_merge_batches": 4, "heldout_fraction": 0.2,
    }  # fmt: skip
    return build_config(FinetuneConfig, values | changes)
