"""Run a model that is larger than the GPU: weights that will be converted stay on the host until they are.

In bf16 a model is twice as large as its FP8 codes, so a GPU that can train it may be too small to hold it before. The
initialisation from gradients still runs the whole model. So these weights stay where they are, mapped from the
checkpoint's files, and each is copied to the GPU for every call of its layer. In a backward pass autograd keeps the
copies of one decoder layer at a time, because decoder layers are recomputed (`pipeline.falqon.observed`). Conversion
replaces the layers, and with them the hooks. LoRA in several processes keeps the layers: their hooks are removed, and
FSDP moves the weights of one decoder layer at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_hooks: Final[WeakKeyDictionary[nn.Module, tuple[RemovableHandle, ...]]] = WeakKeyDictionary()


def stream_weights(model: nn.Module, names: Iterable[str], device: torch.device) -> None:
    """Move everything except the weights of some layers to `device`; these are copied there for each call.

    Args:
        model: on the CPU; changed in place. Results are those of a model that is on the device as a whole.
        names: paths of linear layers whose weight is only read by their own `forward`.
        device: where the model runs.
    """
    held = {name: model.get_submodule(name).get_parameter("weight") for name in names}
    for name in held:
        model.get_submodule(name)._parameters["weight"] = None
    model.to(device)
    for name, weight in held.items():
        layer = model.get_submodule(name)
        layer._parameters["weight"] = weight
        _hooks[layer] = (
            layer.register_forward_pre_hook(partial(_fetch, weight=weight, device=device)),
            layer.register_forward_hook(partial(_give_back, weight=weight), always_call=True),
        )


def stop_streaming(model: nn.Module) -> None:
    """Leave the weights that wait on the host there, as ordinary parameters."""
    for layer in model.modules():
        for hook in _hooks.pop(layer, ()):
            hook.remove()


def _fetch(layer: nn.Module, args: Any, *, weight: Tensor, device: torch.device) -> None:
    layer._parameters["weight"] = nn.Parameter(weight.detach().to(device), requires_grad=False)


def _give_back(layer: nn.Module, args: Any, output: Any, *, weight: nn.Parameter) -> None:
    layer._parameters["weight"] = weight
