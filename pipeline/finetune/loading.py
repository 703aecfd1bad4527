"""Load the base model for training, in the configured dtype and on the configured device.

On a CPU, weights stay mapped from the checkpoint's files, which takes no memory that the system could not reclaim, if
they are stored in the configured dtype, one tensor each. A model that is too large for the GPU is loaded in the same
way, and its weights are copied to the GPU as they are used until they are converted.
"""

from __future__ import annotations

import hashlib
import logging
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, cast

import torch
from torch import nn

from fp8pipe.core import machine
from fp8pipe.core.errors import ConfigurationError, first_line
from fp8pipe.core.machine import format_bytes
from fp8pipe.models.checkpoint.quantized.base import read_base
from fp8pipe.models.checkpoint.tensors import DTYPES, weight_files
from fp8pipe.models.language.sources import ModelSource
from fp8pipe.models.language.structure import ModelStructure, load_config, model_class
from fp8pipe.models.language.unstacking import unstack_experts
from pipeline.falqon.convert import read_convertible
from pipeline.finetune.attention import use_matmul_attention
from pipeline.finetune.config import FinetuneConfig
from pipeline.finetune.streaming import stream_weights

_LOG = logging.getLogger(__name__)
# Largest share of the GPU's memory for a model that is there as a whole. Activations, one layer's temporaries and the
# codes must fit beside it; the codes alone will be half of it.
_RESIDENT: Final = 0.5
_END_BYTES: Final = 1 << 20


def load_model(config: FinetuneConfig, source: ModelSource, *, shared: bool = False) -> nn.Module:
    """Load the base model, with stacked experts split into linear layers.

    Args:
        config: determines dtype, device and gradient checkpointing.
        source: the resolved base model; if it is quantized, its weights are dequantized.
        shared: whether several processes will share its weights.

    Raises:
        ConfigurationError: transformers cannot load it as a causal language model.
    """
    settings, base = load_config(source.path), read_base(source.path)
    kind = model_class(settings)
    streamed = _streamed(config, kind, settings, shared)
    # For a quantized base, transformers would create its own quantized modules; so it is given dequantized tensors.
    weights = {"config": settings, "state_dict": base.state()} if base.stored is not None else {}
    try:
        model = kind.from_pretrained(
            None if weights else source.path, **weights, dtype=getattr(torch, config.dtype), use_safetensors=True,
            trust_remote_code=False, **placement("cpu" if streamed else config.device),
        )  # fmt: skip
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        raise ConfigurationError(
            f"{config.model} cannot be loaded as a causal language model",
            why=first_line(error),
            fix="give a decoder model that transformers knows",
        ) from error
    for part in (model.config, model.config.get_text_config(decoder=True)):
        part.use_cache = False
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.device == "cpu":
        use_matmul_attention(model)
    unstacked = unstack_experts(model)
    if unstacked and config.device != "cpu":
        _LOG.warning(
            "experts run uncompiled, and one after the other unless FALQON groups them (compute capability 9 and 10), "
            "so a step takes longer than its products do"
        )
    if streamed:
        stream_weights(model, streamed, torch.device(config.device))
        return cast(nn.Module, model)
    moved: nn.Module = model.to(config.device)
    return moved


def _streamed(config: FinetuneConfig, kind: Any, settings: Any, shared: bool = False) -> tuple[str, ...]:
    """The layers whose weights stay on the host until they are prepared; none if the model fits on the GPU."""
    if config.device == "cpu":
        return ()
    with torch.device("meta"):
        model = kind._from_config(settings, dtype=getattr(torch, config.dtype))
    size = sum(parameter.nbytes for parameter in model.parameters())
    if not waits_on_host(config, size, shared):
        return ()
    model.tie_weights()
    unstack_experts(model)
    _LOG.info(
        "the model has %s in %s and the GPU %s of memory: until they are prepared, weights are copied there for "
        "each use", format_bytes(size), config.dtype, format_bytes(machine.gpus()[0].memory_bytes),
    )  # fmt: skip
    return read_convertible(model, config.rank).trainable


def waits_on_host(config: FinetuneConfig, size: int, shared: bool = False) -> bool:
    """Whether a model of `size` bytes is too large for the GPU as a whole, and need not be there.

    FALQON converts it layer by layer; with other methods, several processes can share it layer by layer.
    """
    by_layer = config.method == "falqon" or shared
    return config.device != "cpu" and by_layer and size > _RESIDENT * machine.gpus()[0].memory_bytes


def least_memory(config: FinetuneConfig, source: ModelSource, structure: ModelStructure) -> int:
    """Bytes that weights on a CPU take beside files that stay mapped, at least: as they are loaded, or once merged.

    Mapped are only weights that are stored one by one in the configured dtype; the final merge copies what it changes.
    """
    base, dtype = read_base(source.path), cast(torch.dtype, getattr(torch, config.dtype))
    alone = base.stored is None and not structure.naming.experts
    sizes = (math.prod(e.shape) for e in base.entries.values() if not (alone and DTYPES[e.dtype] == dtype))
    merged = sum(math.prod(structure.shape(name)) for name in structure.trainable)
    return max(sum(sizes) * dtype.itemsize, int(merged * config.bytes_per_weight))


def weights_digest(root: Path) -> str:
    """A digest that tells weights from others of the same shapes: of names, sizes, and both ends of each file."""
    digest = hashlib.sha256()
    for file in weight_files(root):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_END_BYTES))
            stream.seek(max(0, size - _END_BYTES))
            digest.update(stream.read())
    return digest.hexdigest()


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
