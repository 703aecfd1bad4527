"""Counts the activations that a training step keeps for its backward pass, without allocating them.

What a decoder layer saves differs by a factor of three between architectures (norms in fp32, soft caps, parallel
branches), so it is not estimated from the layer's widths. The model's own code runs on fake tensors, which have shapes
and dtypes but no values, and autograd reports what it saves. Two layers are enough: each saves the same.
"""

from __future__ import annotations

import copy
from typing import Any, Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fp8pipe.models.language.structure import model_class
from pipeline.finetune.attention import use_matmul_attention

_LAYERS: Final = 2


def layer_count(settings: Any) -> int:
    """The number of decoder layers in a transformers configuration."""
    return int(settings.get_text_config(decoder=True).num_hidden_layers)


def with_layers(settings: Any, count: int) -> Any:
    """A copy of the configuration with only the first `count` layers; lists with one entry per layer are cut, too."""
    settings = copy.deepcopy(settings)
    text = settings.get_text_config(decoder=True)
    full = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list | tuple) and len(value) == full and full > count:
            setattr(text, name, value[:count])
    text.num_hidden_layers = count
    return settings


def saved_bytes(settings: Any, dtype: torch.dtype, batch: int, length: int) -> int | None:
    """Bytes that one decoder layer saves in a forward pass whose weights are frozen.

    Args:
        settings: the model's transformers configuration.
        dtype: of weights and activations.
        batch: sequences in a micro-batch.
        length: tokens of each.

    Returns:
        None if the model's code does not run on fake tensors.
    """
    layers = min(_LAYERS, layer_count(settings))
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return _count(with_layers(settings, layers), dtype, batch, length) // layers
    except Exception:  # the model's own code may raise any type
        return None


def _count(settings: Any, dtype: torch.dtype, batch: int, length: int) -> int:
    kind = model_class(settings)
    from transformers.initialization import no_init_weights

    with no_init_weights():  # some initialisations read values, which fake tensors lack
        model = kind._from_config(settings, dtype=dtype)
    use_matmul_attention(model)
    model.requires_grad_(False)
    model.train()
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    own = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, Tensor] = {}  # holds the tensors, because addresses are unique only while they are alive

    def keep(tensor: Tensor) -> Tensor:
        saved.setdefault(_storage(tensor), tensor)
        return tensor

    tokens = torch.zeros(batch, length, dtype=torch.long)
    places = torch.arange(length).repeat(batch, 1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.get_decoder()(input_ids=tokens, position_ids=places, use_cache=False)
    del output
    return sum(tensor.untyped_storage().nbytes() for place, tensor in saved.items() if place not in own)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
