"""Counts the memory that a frozen vision tower takes for the images of a batch, without its weights.

The tower's own code runs: what it computes from weights and pixels has a shape and a dtype, but no values (torch's meta
device); what it computes from the sizes of images is computed, because it divides the patches into sequences by them.
Nothing is kept for a backward pass, so what counts is the most that is alive at one time.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from fp8pipe.models.language.structure import model_class
from pipeline.dry_run.activations import with_layers
from pipeline.finetune.attention import use_matmul_attention


class _Alive(TorchDispatchMode):
    """While active, counts the bytes of meta tensors that operations create, at most alive at once: `peak`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._counted: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {tensor.device.type for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        if len(given) > 1:  # sizes meet pixels: the result has a shape alone
            args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                self._count(tensor.untyped_storage())
        return result

    def own(self, tensor: Tensor) -> None:
        """Leave out a tensor that was there before."""
        self._counted.add(tensor.untyped_storage()._cdata)

    def _count(self, storage: Any) -> None:
        if storage._cdata in self._counted:
            return
        self._counted.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())

    def _freed(self, place: int, size: int) -> None:
        self._counted.discard(place)
        self.now -= size


class _FusedAttention(TorchFunctionMode):
    """While active, attention makes its output alone, as fused kernels do: torch has none for meta tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        bound = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
        query, value = bound["query"], bound["value"]
        return query.new_empty(*query.shape[:-1], value.shape[-1])


def tower_bytes(settings: Any, dtype: torch.dtype, inputs: Mapping[str, Tensor]) -> int | None:
    """The most bytes that pixels and activations take while the features of a batch's images are computed.

    Args:
        settings: the model's transformers configuration.
        dtype: of weights and activations.
        inputs: `Batch.image_inputs` of the batch, on the CPU.

    Returns:
        None if the tower's code depends on values of pixels, or has no function of its own.
    """
    pixels = sum(value.nbytes for value in inputs.values())
    try:
        with torch.device("meta"):
            model: Any = model_class(settings)._from_config(with_layers(settings, 1), dtype=dtype)
        use_matmul_attention(model)
        names = inspect.signature(model.get_image_features).parameters
        given = {key: value.to("meta", dtype) if value.is_floating_point() else value for key, value in inputs.items()
                 if key in names}  # fmt: skip
        alive = _Alive()
        for tensor in (*model.parameters(), *model.buffers(), *given.values()):
            alive.own(tensor)
        with torch.no_grad(), alive, _FusedAttention():
            features = model.eval().get_image_features(**given)
        del features
    except Exception:  # the model's own code may raise any type
        return None
    return pixels + alive.peak if alive.peak else None
