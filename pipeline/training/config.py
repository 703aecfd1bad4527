"""The configuration of a fine-tuning run: one frozen model, whose resolved form goes into the artifact."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from fp8pipe.config import FrozenConfig
from pipeline.falqon.initialise import Initialisation
from pipeline.falqon.rules import DEFAULT_RULE, update_rule
from pipeline.training.schedule import Schedule


class FinetuneConfig(FrozenConfig):
    """What to train, on what, and how."""

    model: str = Field(description="Base model: directory, hub id, .gguf file or sample:NAME.")
    data: str = Field(description="Training text: JSONL file, hub id or sample:NAME.")
    method: Literal["falqon", "lora", "qlora"] = Field("falqon", description="Fine-tuning method.")
    rank: int = Field(64, ge=1, description="Rank of the adapter.")
    update_rule: str = Field(DEFAULT_RULE, description="FALQON: how B enters the codes.")
    rows: int | None = Field(None, ge=0, description="FALQON: rows flushed a layer and step; default the rank.")
    initialisation: Initialisation = Field(Initialisation.RANDOMIZED_SVD, description="FALQON: where A comes from.")
    lora_alpha: float = Field(64.0, gt=0, description="lora, qlora: the update is scaled by alpha / rank.")
    learning_rate: float = Field(2e-3, gt=0, description="Peak learning rate.")
    schedule: Schedule = Field(Schedule.COSINE, description="Shape of the learning rate after warm-up.")
    warmup_steps: int = Field(5, ge=0, description="Optimizer steps of linear warm-up.")
    optimizer: Literal["adamw", "adamw-8bit"] = Field("adamw", description="Optimizer; 8-bit needs bitsandbytes.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay.")
    beta2: float = Field(0.999, gt=0, lt=1, description="AdamW's second-moment decay.")
    clip_norm: float = Field(1.0, gt=0, description="Global gradient norm limit.")
    steps: int = Field(60, ge=1, description="Optimizer steps.")
    batch_size: int = Field(4, ge=1, description="Sequences a micro-batch.")
    gradient_accumulation: int = Field(1, ge=1, description="Micro-batches an optimizer step.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")
    sequence_length: int = Field(256, ge=8, description="Tokens a sequence, at most.")
    packing: bool = Field(True, description="Put several examples into one sequence, kept apart by position.")
    heldout_fraction: float = Field(0.1, gt=0, lt=1, description="Share of the records kept for evaluation.")
    heldout_limit: int = Field(256, ge=1, description="Held-out records evaluated, at most.")
    evaluate_every: int = Field(50, ge=0, description="Steps between evaluations; 0: only first and last.")
    save_every: int = Field(50, ge=0, description="Steps between checkpoints; 0: only the last.")
    keep_checkpoints: int = Field(2, ge=1, description="Checkpoints kept.")
    log_every: int = Field(5, ge=1, description="Steps between log lines.")
    settle_batches: int = Field(32, ge=1, description="FALQON: training sequences behind the last flush.")
    seed: int = Field(0, ge=0, description="Seed of order, initialisation and rounding.")
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where to train.")
    dtype: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="Dtype of activations and unconverted weights."
    )

    @field_validator("update_rule")
    @classmethod
    def _known_rule(cls, name: str) -> str:
        try:
            return update_rule(name).name
        except Exception as error:
            raise ValueError(str(error)) from error
