"""Means that carry no information for a grid, measured on the calibration images and moved into biases."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fp8pipe.models.vision.outputs import vision_outputs
from pipeline.vit.transforms.heads import centre_keys, centre_values
from pipeline.vit.transforms.wiring import Wiring


@dataclass(slots=True)
class _Mean:
    total: Tensor | None = None
    count: int = 0

    def add(self, output: Tensor) -> None:
        rows = output.flatten(0, -2).double()
        self.total = rows.sum(0) if self.total is None else self.total + rows.sum(0)
        self.count += rows.shape[0]

    @property
    def value(self) -> Tensor:
        assert self.total is not None, "the module never ran"
        return self.total / self.count


@torch.no_grad()
def centre(model: nn.Module, wiring: Wiring, batches: Iterable[Tensor]) -> int:
    """Centre keys, values and the outputs of norms, in place, wherever a bias can take the mean.

    Args:
        model: prepared, eval mode.
        wiring: of it.
        batches: normalized pixels `(N, 3, H, W)`.

    Returns:
        How many tensors were centred.
    """
    norms = {norm: linears for norm, linears in wiring.readers.items() if linears and _all_biased(model, linears)}
    rows = [r for a in wiring.attentions for r in (a.k, a.v) if r is not None]
    means = _means(model, {*norms, *(r.linear for r in rows)}, batches)
    done = 0
    for attention in wiring.attentions:
        if attention.k is not None:
            done += centre_keys(model, attention, means[attention.k.linear][attention.k.slice])
        if attention.v is not None:
            done += centre_values(model, attention, means[attention.v.linear][attention.v.slice])
    for norm, linears in norms.items():
        bias = getattr(model.get_submodule(norm), "bias", None)
        if bias is None:
            continue
        bias -= means[norm]
        for name in linears:
            layer = model.get_submodule(name)
            shift = layer.get_parameter("weight").double() @ means[norm]
            layer.get_parameter("bias").add_(shift.to(bias.dtype))
        done += 1
    return done


def _all_biased(model: nn.Module, linears: tuple[str, ...]) -> bool:
    return all(getattr(model.get_submodule(name), "bias", None) is not None for name in linears)


def _means(model: nn.Module, names: set[str], batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Mean output of each module over images and tokens, float64."""
    sums = {name: _Mean() for name in names}

    def adding(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, args, output: sums[name].add(output)

    handles = [model.get_submodule(name).register_forward_hook(adding(name)) for name in names]
    try:
        for pixels in batches:
            vision_outputs(model, pixels)
    finally:
        for handle in handles:
            handle.remove()
    return {name: mean.value for name, mean in sums.items()}
