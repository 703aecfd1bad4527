"""Static activation scales: what every linear reads on real text, as exact counts, and a power of two from them.

The counts are by the 15 bits of a magnitude in bfloat16: one pass, any order, a fixed size, and clipping, percentiles
and squared errors of any scale follow afterwards. The scale is a power of two: dividing by it rounds nothing, so the
codes are the same whether an engine divides in half precision or in single. That costs less than one of E4M3's 18
binades. Where a scale comes from `amax`, nothing that was seen is clipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from exporters.tensorrt.language.options import Calibration
from exporters.tensorrt.language.target import InputScale
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.language.text import Encoded
from fp8pipe.numerics.grids import E4M3

__all__ = ["InputCounts", "count_inputs", "pre_hooks", "scales_by_layer", "static_scale"]

_BINS: Final = 1 << 15  # bfloat16 without its sign
_CLIPPED: Final = 1e-5  # share of values that `percentile` may clip
_BINADES: Final = 12  # how far below amax `mse` looks
# FP16 holds these powers of two exactly.
_SMALLEST, _LARGEST = -24, 15


@dataclass(slots=True)
class InputCounts:
    """Magnitudes that one input took.

    Attributes:
        counts: `(32768,)` int64, by bfloat16 bits of the magnitude.
        amax: the largest, exact.
    """

    counts: Tensor = field(default_factory=lambda: torch.zeros(_BINS, dtype=torch.int64))
    amax: float = 0.0

    def add(self, x: Tensor) -> None:
        """Count a tensor of any shape and float dtype."""
        magnitude = x.detach().abs()
        largest = float(magnitude.max())
        self.amax = largest if math.isnan(largest) else max(self.amax, largest)
        if not math.isfinite(largest):
            return
        bits = magnitude.to(torch.bfloat16).reshape(-1).view(torch.int16)
        self.counts += torch.bincount(bits.int(), minlength=_BINS)

    @property
    def total(self) -> int:
        """Values seen."""
        return int(self.counts.sum())

    def clipped(self, scale: float) -> float:
        """Share of values beyond the range of E4M3 on this scale."""
        return float(self.counts[_magnitudes() > E4M3.max * scale].sum()) / max(1, self.total)

    def error(self, scale: float) -> float:
        """Mean squared error of rounding to E4M3 on this scale."""
        values = _magnitudes().double()
        rounded = E4M3.cast(values / scale).double() * scale
        seen = self.counts > 0
        return float(((values - rounded)[seen].square() * self.counts[seen]).sum()) / max(1, self.total)

    def quantile(self, beyond: float) -> float:
        """The magnitude that a share of `beyond` exceeds."""
        above = self.counts.flip(0).cumsum(0).flip(0)
        return min(self.amax, float(_magnitudes()[int((above > beyond * self.total).nonzero().max())]))


def count_inputs(model: nn.Module, layers: Sequence[str], text: Sequence[Encoded]) -> dict[str, InputCounts]:
    """Run text through a model and count the inputs of its linears.

    Args:
        model: in evaluation mode.
        layers: names of the linears.
        text: one sequence at a time, without padding.

    Returns:
        Counts by layer; layers that read one tensor share one object.

    Raises:
        ConfigurationError: an input that is not finite.
    """
    groups: dict[str, InputCounts] = {}
    with pre_hooks(model, _observers(layers, groups)), torch.no_grad():
        for example in text:
            model(input_ids=torch.tensor([example.input_ids]), use_cache=False)
    broken = [name for name in layers if name not in groups or not math.isfinite(groups[name].amax)]
    if broken:
        raise ConfigurationError(
            f"{len(broken)} layer(s) cannot be calibrated",
            why=f"the first: {broken[0]} read {'nothing' if broken[0] not in groups else 'NaN or infinity'}",
            fix="look at the model's training; export with --target vllm to use it without static scales",
        )
    return groups


def static_scale(counts: InputCounts, method: Calibration) -> InputScale:
    """The smallest power of two that covers the range which the method asks for."""
    covering = _power_of_two(counts.amax / E4M3.max)
    if method is Calibration.AMAX:
        scale = covering
    elif method is Calibration.PERCENTILE:
        scale = _power_of_two(counts.quantile(_CLIPPED) / E4M3.max)
    else:
        candidates = [_power_of_two(covering * 2.0**-step) for step in range(_BINADES)]
        scale = min(candidates, key=lambda candidate: (counts.error(candidate), -candidate))
    return InputScale(scale=scale, amax=counts.amax, clipped=counts.clipped(scale), values=counts.total)


def scales_by_layer(counts: Mapping[str, InputCounts], method: Calibration) -> dict[str, InputScale]:
    """`static_scale` of every layer; layers that share their counts share the result."""
    found: dict[int, InputScale] = {}
    for count in counts.values():
        if id(count) not in found:
            found[id(count)] = static_scale(count, method)
    return {name: found[id(count)] for name, count in counts.items()}


@contextmanager
def pre_hooks(model: nn.Module, hooks: Mapping[str, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """While active, each named module's input passes its function first, which may give another one in its place."""

    def hook(function: Callable[[Tensor], Tensor | None]) -> Any:
        def run(module: nn.Module, args: Any) -> Any:
            found = function(args[0])
            return None if found is None else (found, *args[1:])

        return run

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(function)) for n, function in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _observers(layers: Sequence[str], groups: dict[str, InputCounts]) -> dict[str, Callable[[Tensor], None]]:
    last: list[tuple[Tensor, InputCounts]] = []  # the tensor itself is kept, so that its identity means something

    def observe(name: str, x: Tensor) -> None:
        if last and last[0][0] is x:
            groups.setdefault(name, last[0][1])
            return
        counts = groups.setdefault(name, InputCounts())
        counts.add(x)
        last[:] = [(x, counts)]

    return {name: partial(observe, name) for name in layers}


def _magnitudes() -> Tensor:
    """The value of every bin, fp32; the last ones are infinity and NaN."""
    return torch.arange(_BINS, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()


def _power_of_two(least: float) -> float:
    """The smallest power of two that is not below `least` and that FP16 holds."""
    exponent = _SMALLEST if least <= 0 else math.ceil(math.log2(least))
    return 2.0 ** min(max(exponent, _SMALLEST), _LARGEST)
