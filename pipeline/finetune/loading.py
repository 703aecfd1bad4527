"""Load the base model for training, in the configured dtype and on the configured device."""

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
    """Load the base model, with stacked experts split into linear layers.

    Args:
        config: determines dtype, device and gradient checkpointing.
        source: the resolved base model; if it is quantized, its weights are dequantized.

    Raises:
        ConfigurationError: transformers cannot load it as a causal language model.
    """
    settings, base = load_config(source.path), read_base(source.path)
    kind = model_class(settings)
    # For a quantized base, transformers would create its own quantized modules; so it is given dequantized tensors.
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
    """Options for `from_pretrained` to load tensors directly to the GPU, so that host memory holds only a few at once.

    Empty for the CPU, and, with a warning, if the package accelerate is not installed.
    """
    if device == "cpu":
        return {}
    if find_spec("accelerate") is None:  # transformers requires it for device_map, though it is not used
        _LOG.warning("the whole model passes through the host's memory on its way to the GPU: pip install accelerate")
        return {}
    return {"device_map": {"": torch.device(device)}}
