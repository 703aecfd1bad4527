"""What a fine-tuning run would take: layers, memory, disk and steps, from headers alone (`--dry-run`)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from fp8pipe.compat import import_transformers
from fp8pipe.sources import check_unquantized, resolve_model
from pipeline.device import hardware
from pipeline.falqon.convert import check_rank, find_candidates
from pipeline.outlook import export_obstacles
from pipeline.training.config import FinetuneConfig

_GIB = 1 << 30
_FP32_STATES = 4  # B, its gradient and AdamW's two moments, four bytes each


@dataclass(frozen=True, slots=True)
class FinetunePlan:
    """A run's needs; sizes in bytes.

    Attributes:
        layers: linear layers that would be converted.
        left_out: those that would not, with the reason.
        trainable: trained parameters.
        steps: optimizer steps.
        tokens: tokens of the whole run, at most.
        weights_bytes: weights in memory.
        adapter_bytes: adapter, its gradient and the optimizer's state.
        disk_bytes: artifact and kept checkpoints.
        hardware: what it needs.
        warnings: what will be refused later.
    """

    layers: int
    left_out: dict[str, str]
    trainable: int
    steps: int
    tokens: int
    weights_bytes: int
    adapter_bytes: int
    disk_bytes: int
    hardware: str
    warnings: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {"plan": asdict(self)}

    def text(self) -> str:
        """The plan for people."""
        left_out = ", ".join(f"{name} ({reason})" for name, reason in self.left_out.items()) or "nothing"
        return "\n".join(
            [
                f"would convert {self.layers} linear layers; left out: {left_out}",
                f"would train {self.trainable:,} parameters for {self.steps} steps, at most {self.tokens:,} tokens",
                f"memory before activations: weights {self.weights_bytes / _GIB:.2f} GiB, "
                f"adapter and optimizer {self.adapter_bytes / _GIB:.2f} GiB",
                f"disk: {self.disk_bytes / _GIB:.2f} GiB",
                f"hardware: {self.hardware}",
                *(f"warning: {warning}" for warning in self.warnings),
            ]
        )


def plan_finetune(config: FinetuneConfig) -> FinetunePlan:
    """Plan a run without loading a weight.

    Raises:
        ConfigurationError: what the run itself would refuse about model and rank.
    """
    source = resolve_model(config.model)
    check_unquantized(source.path)
    transformers = import_transformers()
    settings = transformers.AutoConfig.from_pretrained(source.path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=getattr(torch, config.dtype))
    model.tie_weights()
    candidates, skipped = find_candidates(model)
    check_rank(candidates, config.rank)
    shapes = [candidate.shape for candidate in candidates]
    linear = sum(out * into for out, into in shapes)
    others = sum(p.numel() for p in model.parameters()) - linear
    width = getattr(torch, config.dtype).itemsize
    falqon = config.method == "falqon"
    adapter = sum(out if falqon else out + into for out, into in shapes) * config.rank
    weights = others * width + int(linear * {"falqon": 1.0, "lora": width, "qlora": 0.53}[config.method])
    checkpoint = 3 * 4 * adapter  # B and two moments
    deployed = others * width + linear * (1 if falqon else width)
    return FinetunePlan(
        layers=len(candidates),
        left_out={record.name: record.reason for record in skipped},
        trainable=adapter,
        steps=config.steps,
        tokens=config.steps * config.gradient_accumulation * config.batch_size * config.sequence_length,
        weights_bytes=weights,
        adapter_bytes=_FP32_STATES * 4 * adapter,
        disk_bytes=deployed + config.keep_checkpoints * checkpoint,
        hardware=hardware(config.method, config.device),
        warnings=tuple(export_obstacles(model)),
    )
