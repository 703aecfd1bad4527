"""The optimizers: torch's fused AdamW, and bitsandbytes' 8-bit one for when B's two fp32 moments are too much."""

from __future__ import annotations

import torch
from torch import nn

from fp8pipe.core.errors import MissingCapabilityError
from pipeline.finetune.config import FinetuneConfig


def build_optimizer(config: FinetuneConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW over `parameters`; its learning rate is set each step by the loop.

    Raises:
        MissingCapabilityError: 8-bit AdamW without bitsandbytes.
    """
    options = {"lr": config.learning_rate, "betas": (0.9, config.beta2), "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **options)  # type: ignore[arg-type]
    try:
        import bitsandbytes
    except ImportError as error:
        raise MissingCapabilityError(
            "the 8-bit AdamW needs bitsandbytes", why=str(error), fix="pip install 'fp8pipe[train]'"
        ) from error
    return bitsandbytes.optim.AdamW8bit(parameters, **options)
