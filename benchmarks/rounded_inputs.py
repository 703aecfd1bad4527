"""Contexts in which the inputs of linear layers are rounded as engines round them: in FP8 per token, or in NVFP4."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from fp8pipe.numerics.grids import E4M3, amax_scale
from fp8pipe.numerics.nvfp4 import BlockQuantizer, tensor_scale


@contextmanager
def fp8_inputs(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Inputs of these layers are rounded to E4M3, with one dynamic scale per token."""

    def cast(x: Tensor) -> Tensor:
        scale = amax_scale(x.float().abs().amax(-1, keepdim=True), E4M3)
        return E4M3.cast(x.float() / scale).float() * scale

    with _changed(model, dict.fromkeys(names, cast)):
        yield


@contextmanager
def nvfp4_inputs(model: nn.Module, names: Sequence[str], batches: Sequence[dict[str, Tensor]]) -> Iterator[None]:
    """Inputs of these layers are rounded to NVFP4, with a tensor scale for each layer from the largest of `batches`."""
    amax = dict.fromkeys(names, 0.0)

    def see(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        amax[name] = max(amax[name], float(args[0].abs().max()))

    handles = [model.get_submodule(name).register_forward_pre_hook(partial(see, name)) for name in names]
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    with _changed(model, {name: BlockQuantizer(tensor_scale(amax[name])).fake for name in names}):
        yield


@contextmanager
def _changed(model: nn.Module, casts: dict[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    def change(cast: Callable[[Tensor], Tensor], module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (cast(args[0]).to(args[0].dtype),)

    handles = [model.get_submodule(n).register_forward_pre_hook(partial(change, cast)) for n, cast in casts.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
