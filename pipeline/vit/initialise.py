"""Where a student starts: ranges of all activations measured on images, and steps of all weights.

Every range is the one with the least squared rounding error on a sample of its values. The search shrinks the observed
range from both ends, together and then one end alone, because few distributions here are symmetric: GELU ends at
-0.17, probabilities at zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Final

import torch
from torch import Tensor

from fp8pipe.models.vision.quantized import QuantizedVit, Quantizer, activation_sites
from fp8pipe.models.vision.sources import VisionModel
from fp8pipe.models.vision.structure import VitStructure
from fp8pipe.numerics.grids import E4M3
from fp8pipe.numerics.kinds import Kind
from fp8pipe.numerics.nvfp4 import BlockQuantizer, BlockScales, choose_block_scales, tensor_scale
from fp8pipe.numerics.quantizers import (
    INT8_MAX,
    INT8_MIN,
    ActivationQuantizer,
    nearest_codes,
    storable_scale,
    weight_limits,
)
from pipeline.vit.student import WeightFormat

_SAMPLE: Final = 1 << 15  # values of a site that its range is chosen on
_SHRINKS: Final = tuple(0.97**i for i in range(0, 90, 3))  # 1 down to 0.07
_WEIGHT_SHRINKS: Final = tuple(1.0 - 0.02 * i for i in range(35))  # 1 down to 0.32
_TINY: Final = 1e-8


def choose_quantizer(values: Tensor, bits: int, kind: Kind) -> Quantizer:
    """`choose_range`; for NVFP4 the tensor scale under which blocks reach the largest magnitude."""
    if kind is Kind.NVFP4:
        return BlockQuantizer(tensor_scale(float(values.abs().max())))
    return choose_range(values, bits, kind)


def choose_range(values: Tensor, bits: int, kind: Kind = Kind.INT) -> ActivationQuantizer:
    """The range with the least squared error on `values`.

    Args:
        values: fp32, one dimension, what the site saw.
        bits: 2 to 8; at most `2^bits` codes, all in INT8 around zero.
        kind: integer codes, or E4M3, whose scale maps the largest magnitude onto 448.
    """
    smallest, largest = min(0.0, float(values.min())), max(0.0, float(values.max()))
    if kind is Kind.E4M3:
        return ActivationQuantizer(_storable(max(-smallest, largest, _TINY) / E4M3.max), kind=kind)
    best = _Best(values, bits)
    for shrink in _SHRINKS:
        best.consider(smallest * shrink, largest * shrink)
    for _ in range(2):
        low, high = best.ends
        for shrink in _SHRINKS:
            best.consider(smallest * shrink, high)
        low, high = best.ends
        for shrink in _SHRINKS:
            best.consider(low, largest * shrink)
    return best.quantizer


class _Best:
    """The best range so far."""

    def __init__(self, values: Tensor, bits: int) -> None:
        self._values, self._bits = values, bits
        self._error = math.inf
        self.ends = (0.0, 0.0)
        self.quantizer = ActivationQuantizer(1.0)

    def consider(self, low: float, high: float) -> None:
        """Measure the range `low`..`high` and keep it if it is better."""
        quantizer = range_quantizer(low, high, self._bits)
        error = float((quantizer.fake(self._values) - self._values).square().mean())
        if error < self._error:
            self._error, self.ends, self.quantizer = error, (low, high), quantizer


def range_quantizer(low: float, high: float, bits: int) -> ActivationQuantizer:
    """The grid of `bits` that covers `low`..`high` (low <= 0 <= high), zero being a code.

    At 8 bits values of both signs have all of INT8: the same step clips less, and engines need no Clip, which would
    keep them from fusing attention.
    """
    levels = 2**bits - 1
    # What does not fit the INT8 container around zero makes the step larger: at 8 bits, a range of one sign.
    step = _storable(max((high - low) / levels, high / INT8_MAX, low / INT8_MIN, _TINY))
    if low < 0 and levels == INT8_MAX - INT8_MIN:
        return ActivationQuantizer(step, INT8_MIN, INT8_MAX)
    bottom = max(INT8_MIN, -levels, round(low / step))
    return ActivationQuantizer(step, bottom, max(min(INT8_MAX, bottom + levels), bottom + 1))


def _storable(value: float) -> float:
    return float(storable_scale(torch.tensor(value)))


def sample_sites(
    vision: VisionModel, structure: VitStructure, batches: Iterable[Tensor], seed: int
) -> dict[str, Tensor]:
    """A sample of the values at every activation site of the float model.

    Args:
        vision: the float model.
        structure: of it.
        batches: normalized pixels `(N, 3, H, W)`.
        seed: of the choice of values.

    Returns:
        By site, up to 32,768 fp32 values a batch, extremes of the batch included.
    """
    plain = QuantizedVit(vision.model, vision.architecture, vision.preprocessing, structure, {}, {})
    wanted = set(activation_sites(structure))
    parts: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(seed)
    for pixels in batches:
        for name, tap in plain.taps(pixels).items():
            for what, tensor in tap.items():
                site = f"{name}.{'probs' if what == 'probs_in' else what}"
                if site in wanted:
                    parts.setdefault(site, []).append(_sample(tensor.flatten(), generator))
    return {site: torch.cat(parts[site]) for site in activation_sites(structure) if site in parts}


def _sample(values: Tensor, generator: torch.Generator) -> Tensor:
    if values.numel() <= _SAMPLE:
        return values.clone()
    chosen = values[torch.randint(values.numel(), (_SAMPLE - 2,), generator=generator)]
    return torch.cat([chosen, values.min().view(1), values.max().view(1)])


def choose_step(weight: Tensor, form: WeightFormat) -> Tensor:
    """Steps `(out,)` fp32 with the least squared rounding error, channel by channel."""
    flat = weight.detach().flatten(1).float()
    amax = flat.abs().amax(1).clamp(min=_TINY)
    if form.kind is Kind.E4M3:
        return storable_scale(amax / E4M3.max)
    low, high = weight_limits(form.bits)
    best = torch.full_like(amax, math.inf)
    steps = storable_scale(amax / high)
    for shrink in _WEIGHT_SHRINKS:
        step = storable_scale(amax * shrink / high)
        rounded = nearest_codes(flat / step[:, None], low, high).mul_(step[:, None])
        error = (rounded - flat).square().sum(1)
        steps = torch.where(error < best, step, steps)
        best = torch.minimum(error, best)
    return steps


def choose_steps(vision: VisionModel, formats: Mapping[str, WeightFormat]) -> dict[str, Tensor | BlockScales]:
    """`choose_step`, or `choose_block_scales` for NVFP4, for every linear of `formats`."""
    found: dict[str, Tensor | BlockScales] = {}
    for name, form in formats.items():
        weight = vision.model.get_submodule(name).get_parameter("weight")
        found[name] = choose_block_scales(weight) if form.kind is Kind.NVFP4 else choose_step(weight, form)
    return found
