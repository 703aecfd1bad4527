"""Load the base model for training: in the configured dtype, on the device, one tensor at a time."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.checkpoint.quantized.base import read_base
from fp8pipe.models.language.experts import unstack_experts
from fp8pipe.models.language.sources import ModelSource
from fp8pipe.models.language.structure import load_config, model_class
from pipeline.finetune.attention import use_matmul_attention
from pipeline.finetune.config import FinetuneConfig

_LOG = logging.getLogger(__name__)


def load_model(config: FinetuneConfig, source: ModelSource) -> nn.Module:
    """Load the base model in the configured dtype, on its device, with stacked experts split into linear layers."""
    settings, base = load_config(source.path), read_base(source.path)
    kind = model_class(settings)
    # transformers would load a quantized base into quantized modules of its own; it gets dequantized tensors instead.
    weights = {"config": settings, "state_dict": base.state()} if base.stored is not None else {}
    try:
        model = kind.from_pretrained(
            None if weights else source.path, **weights, dtype=getattr(torch, config.dtype), use_safetensors=True,
            trust_remote_code=False, **placement(config.device),
        )  # fmt: skip
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise ConfigurationError(
            f"{config.model} cannot be loaded as a causal language model",
            why=str(error).splitlines()[0],
            fix="give a decoder model that transformers knows",
        ) from error
    for part in (model.config, model.config.get_text_config(decoder=True)):
        part.use_cache = False
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.device == "cpu":
        use_matmul_attention(model)
    moved: nn.Module = model.to(config.device)
    if unstack_experts(moved) and config.device != "cpu":
        _LOG.warning(
            "experts run uncompiled and one after the other, so a step takes longer than its matrix products alone"
        )
    return moved


def placement(device: str) -> dict[str, Any]:
    """Options of `from_pretrained` that load tensors straight to the GPU, with only a few in host memory at once."""
    if device == "cpu":
        return {}
    if find_spec("accelerate") is None:  # transformers requires it for device_map, though it is not used
        _LOG.warning("the whole model passes through the host's memory on its way to the GPU: pip install accelerate")
        return {}
    return {"device_map": {"": torch.device(device)}}
