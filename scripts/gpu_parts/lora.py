"""LoRA with the arithmetic of peft, as a baseline on machines without peft.

As in peft 0.21 without dropout, A and B are fp32, and under autocast the output is `W x + B (A x) alpha / rank`, with x
cast to fp32 first. `tests/scripts/test_gpu_session.py` compares outputs and gradients with those of peft, bit for bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fp8pipe.artifact import LayerRecord
from pipeline.falqon.convert import left_out_records, read_convertible
from pipeline.falqon.initialise import Losses
from pipeline.finetune.method import LoraMethod


class PlainLora(nn.Module):
    """A frozen linear layer plus a LoRA adapter."""

    def __init__(self, base: nn.Linear, rank: int, scaling: float) -> None:
        super().__init__()
        self.base, self.scaling = base, scaling
        place = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, **place)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, **place)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Apply layer and adapter to x `(..., in)`; returns `(..., out)`."""
        plain: Tensor = self.base(x)
        return plain + self.lora_B(self.lora_A(x.float())) * self.scaling


class PlainLoraMethod(LoraMethod):
    """LoRA on bf16 weights without peft, for measurements only: it can be neither merged nor saved."""

    def prepare(
        self, model: nn.Module, stored: dict[str, Tensor] | None = None, losses: Losses | None = None
    ) -> list[LayerRecord]:
        """Insert adapters into the model in place; returns the records of the layers that get none."""
        structure = read_convertible(model, self.rank)
        model.requires_grad_(False)
        torch.manual_seed(self.seed)
        self.names = structure.trainable
        self._model = model
        for name in self.names:
            parent, _, child = name.rpartition(".")
            layer = PlainLora(model.get_submodule(name), self.rank, self.alpha / self.rank)
            setattr(model.get_submodule(parent), child, layer)
        return left_out_records(structure)

    def parameters(self) -> dict[str, nn.Parameter]:
        """A and B of every layer."""
        return {name: p for name, p in self._model.named_parameters() if p.requires_grad}
