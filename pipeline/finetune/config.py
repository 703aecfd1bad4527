"""The configuration of a fine-tuning run: a frozen pydantic model, stored in the artifact with all defaults resolved.

Learning-rate schedules are plain functions of the step, so that a resumed run needs no scheduler state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import Field, field_validator, model_validator

from fp8pipe.core.config import CONFIG_ONLY, Flag, FrozenConfig
from fp8pipe.core.devices import DEVICE_HELP, DeviceName, GpuNeed
from fp8pipe.core.errors import ConfigurationError
from pipeline.falqon.rules import DEFAULT_RULE, RULES, Initialisation, UpdateRule, update_rule
from pipeline.tracking.config import ReportTo

# Only FALQON uses FP8 tensor cores; the baselines LoRA and QLoRA compute in bf16.
FALQON_NEED: Final = GpuNeed("falqon", (8, 0), "bf16; FP8 products from 8.9 on")
LORA_NEED: Final = GpuNeed("lora and qlora", (8, 0), "bf16")
_FALQON_ONLY = ("update_rule", "rows", "initialisation")


class Schedule(StrEnum):
    """Learning-rate schedule after warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


def learning_rate_at(step: int, *, peak: float, steps: int, warmup: int, schedule: Schedule) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    Args:
        step: the step.
        peak: the learning rate at the end of warm-up.
        steps: total number of steps; cosine and linear schedules decay to zero at this step.
        warmup: number of warm-up steps, in which the learning rate rises linearly to reach `peak` at step `warmup`.
        schedule: the schedule after warm-up.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule is Schedule.CONSTANT:
        return peak
    done = (step - warmup) / max(1, steps - warmup)
    if schedule is Schedule.LINEAR:
        return peak * (1.0 - done)
    return peak * 0.5 * (1.0 + math.cos(math.pi * done))


class FinetuneConfig(FrozenConfig):
    """The configuration of a fine-tuning run: base model, training text, method, and training options.

    Defaults that depend on other options are filled in, so that the manifest records the values that were used. Options
    that do not apply to the method are None; setting one of them is an error.
    """

    renamed: ClassVar[Mapping[str, str]] = {"settle_batches": "final_merge_batches"}

    model: str = Field(description="Base model: directory, hub id, .gguf file or sample:NAME.")
    data: str = Field(description="Training text: file, folder, glob, hub id or sample:NAME.")
    answers: Literal["all", "last"] = Field("all", description="Answers of each conversation that are trained on.")
    method: Literal["falqon", "lora", "qlora"] = Field("falqon", description="How to tune; lora and qlora: baselines.")
    precision: Annotated[Literal["fp8", "nvfp4"] | None, Flag(default="fp8")] = Field(
        None, description="Number format of the weights after training; lora, qlora: bf16 by default, or nvfp4."
    )
    rank: int = Field(64, ge=1, description="Rank of the adapter.")
    update_rule: Annotated[str | None, Flag(default=DEFAULT_RULE)] = Field(
        None, description="FALQON: how updates enter the FP8 codes.", json_schema_extra={"enum": [*RULES]}
    )
    rows: Annotated[int | None, Flag(default="the rank")] = Field(
        None, ge=0, description="FALQON: rows flushed per layer and step, by rules that flush."
    )
    initialisation: Annotated[Initialisation | None, Flag(default="the update rule's")] = Field(
        None, description="FALQON: where A comes from."
    )
    lora_alpha: Annotated[float | None, Flag(default="the rank")] = Field(
        None, gt=0, description="lora, qlora: the update is scaled by alpha / rank."
    )
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate.")
    schedule: Schedule = Field(Schedule.COSINE, description="Shape of the learning rate after warm-up.")
    warmup_steps: int = Field(5, ge=0, description="Steps of linear warm-up.")
    optimizer: Literal["adamw", "adamw-8bit"] = Field("adamw", description="Optimizer; 8-bit needs bitsandbytes.")
    weight_decay: Annotated[float, CONFIG_ONLY] = Field(0.0, ge=0, description="Decoupled weight decay.")
    beta2: Annotated[float, CONFIG_ONLY] = Field(0.999, gt=0, lt=1, description="AdamW's second-moment decay.")
    clip_norm: Annotated[float, CONFIG_ONLY] = Field(1.0, gt=0, description="Global gradient norm limit.")
    steps: int = Field(60, ge=1, description="Optimizer steps.")
    batch_size: int = Field(4, ge=1, description="Sequences per micro-batch.")
    gradient_accumulation: int = Field(1, ge=1, description="Micro-batches per optimizer step.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")
    sequence_length: int = Field(256, ge=8, description="Tokens per sequence, at most.")
    packing: bool = Field(True, description="Several examples in a sequence, kept apart by position.")
    heldout_fraction: float = Field(0.1, gt=0, lt=1, description="Share of the records kept for evaluation.")
    heldout_limit: Annotated[int, CONFIG_ONLY] = Field(256, ge=1, description="Held-out records evaluated, at most.")
    evaluate_every: int = Field(50, ge=0, description="Steps between evaluations; 0: first and last only.")
    save_every: int = Field(50, ge=0, description="Steps between checkpoints; 0: only the last.")
    keep_checkpoints: Annotated[int, CONFIG_ONLY] = Field(2, ge=1, description="Checkpoints kept.")
    log_every: int = Field(5, ge=1, description="Steps between log lines.")
    gradient_batches: Annotated[int, CONFIG_ONLY] = Field(
        2, ge=1, description="FALQON: micro-batches used by the gradient initialisation."
    )
    final_merge_batches: Annotated[int | None, CONFIG_ONLY] = Field(
        None, ge=1, description="FALQON, NVFP4: training sequences used by the final merge; default 32, for NVFP4 256."
    )
    seed: int = Field(0, ge=0, description="Seed of data order, initialisation and all other random draws.")
    device: DeviceName = Field("auto", description=DEVICE_HELP)
    dtype: Annotated[Literal["bfloat16", "float32"], CONFIG_ONLY] = Field(
        "bfloat16", description="Dtype of activations and unconverted weights."
    )
    report_to: ReportTo = ()

    @field_validator("update_rule")
    @classmethod
    def _known_rule(cls, name: str | None) -> str | None:
        try:
            return None if name is None else update_rule(name).name
        except Exception as error:
            raise ValueError(str(error)) from error

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Fill in the defaults that depend on other options; an option that is None counts as not given."""
        if not isinstance(values, dict):
            return values
        given = {key: value for key, value in values.items() if value is not None}
        method, rank = str(given.get("method", "falqon")), given.get("rank", cls.model_fields["rank"].default)
        usable = isinstance(rank, int) and rank >= 1  # otherwise its own validation reports it
        defaults: dict[str, Any] = {}
        if method == "falqon":
            defaults |= {"precision": "fp8", "update_rule": DEFAULT_RULE, "final_merge_batches": 32}
            rule = RULES.get(str(given.get("update_rule", DEFAULT_RULE)))
            if rule is not None:
                defaults["initialisation"] = rule.initialisation
            if rule is not None and usable and _takes_rows(rule):
                defaults["rows"] = rank
        elif usable:
            defaults["lora_alpha"] = rank
        if given.get("precision") == "nvfp4":
            defaults["final_merge_batches"] = 256
        return defaults | given

    @model_validator(mode="after")
    def _refuse_what_does_not_apply(self) -> Self:
        """Reject options without effect, so that a misunderstanding is found before hours of training."""
        found = []
        if self.method == "falqon":
            if self.lora_alpha is not None:
                found.append("lora_alpha does not apply to falqon, whose update has no other scale than learning_rate")
            if self.rows is not None and not _takes_rows(self.rule):
                why = "always flushes the rank's number of rows" if self.rule.rank_rows else "flushes once, at the end"
                found.append(f"rows does not apply to the update rule {self.update_rule}, which {why}")
            if self.precision == "nvfp4" and not (self.rule.live and not self.rule.flush_every_step):
                usable = ", ".join(name for name, rule in RULES.items() if rule.live and not rule.flush_every_step)
                found.append(f"the update rule {self.update_rule} changes FP8 codes; in NVFP4 there are {usable}")
        else:
            given = [name for name in _FALQON_ONLY if getattr(self, name) is not None]
            if self.precision == "fp8":
                found.append(f"{self.method} trains no FP8 weights; of the precisions, only nvfp4 applies to it")
            found += [f"{name} does not apply to {self.method}, only to falqon" for name in given]
        if found:
            raise ValueError("; ".join(found))
        return self

    @property
    def rule(self) -> UpdateRule:
        """The update rule of FALQON; the default rule for other methods, which do not use it."""
        return update_rule(self.update_rule or DEFAULT_RULE)

    @property
    def merge_batches(self) -> int:
        """Number of micro-batches that the final merge runs; 0 for methods that do not calibrate it."""
        return math.ceil((self.final_merge_batches or 0) / self.batch_size)

    @property
    def bytes_per_weight(self) -> float:
        """Bytes of a trained weight in the output: codes, for NVFP4 with their block scales, or bf16."""
        return 9 / 16 if self.precision == "nvfp4" else 1 if self.method == "falqon" else 2

    @property
    def saves(self) -> int:
        """Number of checkpoints that a run writes."""
        return math.ceil(self.steps / self.save_every) if self.save_every else 1

    @property
    def gpu_need(self) -> GpuNeed:
        """The GPU features that the method requires."""
        return FALQON_NEED if self.method == "falqon" else LORA_NEED


def check_processes(config: FinetuneConfig, size: int) -> None:
    """Refuse what would leave some of `size` processes without work.

    Raises:
        ConfigurationError: it is refused.
    """
    count = config.gradient_accumulation
    if size > 1 and config.precision == "nvfp4":
        raise ConfigurationError(
            f"{size} processes cannot share a run in NVFP4", why="packed codes and their block scales are not sharded",
            fix="start one process, or use --precision fp8",
        )  # fmt: skip
    if count < size:
        raise ConfigurationError(
            f"{size} processes have {count} micro-batch(es) per step to share",
            why=f"gradient_accumulation is {count}; a micro-batch is computed by one of the {size} processes",
            fix=f"use --gradient-accumulation {size} or a multiple of it; with --batch-size divided by as much, a "
            "step has as many sequences as before",
        )


def _takes_rows(rule: UpdateRule) -> bool:
    return rule.flush_every_step and not rule.rank_rows
