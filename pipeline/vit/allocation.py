"""Bit widths of activations by sensitivity: more where rounding changes the outputs most, fewer elsewhere.

With 3 bits everywhere, attention probabilities and hidden activations cost most of the accuracy. Here the widths
minimize the sum of what each site adds to the distance of the outputs when it alone is rounded, while the mean over all
multiplications stays as requested: bits cost what they cost in bit operations (HAWQ-V3, arXiv 2011.10680). That the
effects of sites add up is an assumption, which is usual in allocations by sensitivity (ZeroQ, arXiv 2001.00281).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from fp8pipe.models.vision.quantized import QuantizedVit, Quantizer
from fp8pipe.models.vision.sources import VisionModel
from fp8pipe.models.vision.structure import VitStructure
from pipeline.vit.losses import output_distance

_EDGE: Final = 8  # sites of this width keep it
_LEAST: Final = 2
_FEWER, _MORE = 1, 2  # bits below and above the requested width that are tried
Costs = Mapping[str, Mapping[int, float]]


@torch.no_grad()
def allocate_bits(
    vision: VisionModel,
    structure: VitStructure,
    bits: Mapping[str, int],
    ranges: Callable[[Mapping[str, int]], Mapping[str, Quantizer]],
    pixels: Tensor,
) -> dict[str, int]:
    """Choose the bit width of each activation site by how much its rounding changes the outputs.

    Args:
        vision: the float model.
        structure: its structure.
        bits: the requested widths by site; sites of 8 bits keep theirs.
        ranges: quantizers by site for given widths.
        pixels: normalized images `(N, 3, H, W)` that the outputs are compared on, on the model's device.

    Returns:
        Widths by site. Their mean over the multiplications of sites below 8 bits is at most that of `bits`.
    """
    model = QuantizedVit(vision.model, vision.architecture, vision.preprocessing, structure, {}, {})
    exact, sizes = model(pixels), multiplications(structure)
    costs: dict[str, dict[int, float]] = {site: {} for site, width in bits.items() if width < _EDGE}
    requested = max((bits[site] for site in costs), default=_EDGE)
    for width in range(max(_LEAST, requested - _FEWER), min(_EDGE, requested + _MORE) + 1):
        quantizers = ranges({site: width if site in costs else _EDGE for site in bits})
        for site, cost in costs.items():
            model.activations = {site: quantizers[site]}
            distance = output_distance(model(pixels), exact, vision.architecture.activation, structure.is_backbone, 1.0)
            cost[width] = float(distance)
    return {**bits, **spend(costs, sizes, sum(sizes[site] * bits[site] for site in costs))}


def spend(costs: Costs, sizes: Mapping[str, int], budget: int) -> dict[str, int]:
    """Widths with a small sum of costs whose sum of `size * width` is within a budget.

    Starting from the smallest widths, the step that lowers the cost most for what it takes of the budget is made, again
    and again, as long as one fits that lowers it at all. A step may be of several bits, since a first bit may gain less
    than the next one.

    Args:
        costs: by site and width.
        sizes: number of multiplications by site.
        budget: bits in all.

    Returns:
        Widths by site.
    """
    chosen = {site: min(tried) for site, tried in costs.items()}
    left = budget - sum(sizes[site] * width for site, width in chosen.items())
    while True:
        steps = [
            ((costs[site][chosen[site]] - cost) / (sizes[site] * (width - chosen[site])), site, width)
            for site, tried in costs.items()
            for width, cost in tried.items()
            if width > chosen[site] and sizes[site] * (width - chosen[site]) <= left
        ]
        gain, site, width = max(steps, default=(0.0, "", 0))
        if gain <= 0:
            return chosen
        left -= sizes[site] * (width - chosen[site])
        chosen[site] = width


def multiplications(structure: VitStructure) -> dict[str, int]:
    """Number of multiplications in which the values of each activation site take part, for one image."""
    counts: Counter[str] = Counter()
    for linear in structure.linears:
        counts[f"{linear.input_group}.input"] += linear.rows * linear.shape[0] * linear.shape[1]
    for attention in structure.attentions:  # q with k, and probabilities with v
        each = attention.windows * attention.heads * attention.queries * attention.tokens * attention.head_dim
        counts.update({f"{attention.name}.{operand}": each for operand in ("q", "k", "probs", "v")})
    return dict(counts)
