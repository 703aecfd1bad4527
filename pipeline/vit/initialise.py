"""Initial values of a student: number formats, and scales of weights and activations.

The range of each activation is the one with the smallest squared rounding error on a sample of its values. The search
shrinks the observed range at both ends together, then at each end separately, because few distributions are symmetric:
GELU's minimum is -0.17, that of probabilities is zero. Some ranges of few bits are chosen again, see `output_ranges`.
Weights are prepared for rounding in `rounding`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Final

import torch
from torch import Tensor

from fp8pipe.core.devices import to_device
from fp8pipe.models.vision.quantized import QuantizedVit, Quantizer, activation_sites
from fp8pipe.models.vision.sources import VisionModel
from fp8pipe.models.vision.structure import VitStructure
from fp8pipe.numerics.grids import E4M3
from fp8pipe.numerics.kinds import Kind, Precision
from fp8pipe.numerics.nvfp4 import BLOCK, BlockQuantizer, BlockScales, choose_block_scales, tensor_scale
from fp8pipe.numerics.quantizers import (
    INT8_MAX,
    INT8_MIN,
    ActivationQuantizer,
    nearest_codes,
    storable_scale,
    weight_limits,
)
from pipeline.vit.student import WeightFormat

_SAMPLE: Final = 1 << 15  # maximum number of values sampled from each batch at an activation site
_SHRINKS: Final = tuple(0.97**i for i in range(0, 90, 3))  # factors tried for activation ranges, from 1 down to 0.07
_WEIGHT_SHRINKS: Final = tuple(1.0 - 0.02 * i for i in range(35))  # factors tried for weight scales, from 1 to 0.32
_TINY: Final = 1e-8


def choose_quantizer(values: Tensor, bits: int, kind: Kind) -> Quantizer:
    """The quantizer for an activation site, chosen from a sample of its values (fp32, 1-d).

    For integers and E4M3 it is that of `choose_range`. For NVFP4, whose block scales are computed at run time, only the
    tensor scale is chosen: the one with which block scales can represent the largest magnitude.
    """
    if kind is Kind.NVFP4:
        return BlockQuantizer(tensor_scale(float(values.abs().max())))
    return choose_range(values, bits, kind)


def choose_range(values: Tensor, bits: int, kind: Kind = Kind.INT) -> ActivationQuantizer:
    """The quantizer whose range has the smallest squared rounding error on a sample of an activation site's values.

    Args:
        values: the sample, fp32, 1-d.
        bits: 2 to 8 bits; an integer grid has at most `2^bits` codes, within INT8 and including zero.
        kind: integers or E4M3. For E4M3 there is no search; the scale maps the largest magnitude to 448.
    """
    smallest, largest = min(0.0, float(values.min())), max(0.0, float(values.max()))
    if kind is Kind.E4M3:
        return ActivationQuantizer(_storable(max(-smallest, largest, _TINY) / E4M3.max), kind=kind)
    least, low, high, best = math.inf, 0.0, 0.0, ActivationQuantizer(1.0)

    def consider(ranges: Iterable[tuple[float, float]]) -> None:
        nonlocal least, low, high, best
        for ends in ranges:
            quantizer = range_quantizer(*ends, bits)
            error = float((quantizer.fake(values) - values).square().mean())
            if error < least:
                least, (low, high), best = error, ends, quantizer

    consider((smallest * shrink, largest * shrink) for shrink in _SHRINKS)
    for _ in range(2):
        consider([(smallest * shrink, high) for shrink in _SHRINKS])
        consider([(low, largest * shrink) for shrink in _SHRINKS])
    return best


def range_quantizer(low: float, high: float, bits: int) -> ActivationQuantizer:
    """The integer quantizer of `bits` bits that covers the range `low`..`high` (low <= 0 <= high) and represents zero.

    With 8 bits, a range with both signs gets all codes of INT8. This clips less with the same scale, and engines need
    no Clip operator, which would prevent them from fusing attention.
    """
    levels = 2**bits - 1
    # Codes must fit into INT8 with 0 as the code of zero, so with 8 bits a range of one sign has half the codes only,
    # and a larger step.
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
    """Sample the values at every activation site of the float model.

    Args:
        vision: the float model.
        structure: its structure.
        batches: normalized pixels `(N, 3, H, W)`, on the model's device.
        seed: seed of the sampling.

    Returns:
        For each site up to 32,768 fp32 values per batch, including minimum and maximum of the batch.
    """
    plain = QuantizedVit(vision.model, vision.architecture, vision.preprocessing, structure, {}, {})
    wanted = set(activation_sites(structure))
    parts: dict[str, list[Tensor]] = {}
    generator = torch.Generator().manual_seed(seed)

    def keep(name: str, what: str, tensor: Tensor) -> None:
        site = f"{name}.{'probs' if what == 'probs_in' else what}"
        if site in wanted:
            parts.setdefault(site, []).append(_sample(tensor.flatten(), generator))

    for pixels in batches:
        plain.watch(pixels, keep)
    return {site: torch.cat(parts[site]) for site in activation_sites(structure) if site in parts}


def _sample(values: Tensor, generator: torch.Generator) -> Tensor:
    if values.numel() <= _SAMPLE:
        return values.clone()
    places = torch.randint(values.numel(), (_SAMPLE - 2,), generator=generator)
    chosen = values[to_device(places, values.device)]
    return torch.cat([chosen, values.min().view(1), values.max().view(1)])


def choose_step(weight: Tensor, form: WeightFormat) -> Tensor:
    """Scales `(out,)` fp32, one per output channel, for a weight `(out, ...)`.

    Integer scales are those with the smallest squared rounding error; E4M3 scales map the largest magnitude to 448.
    """
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
    """The weight scales of every linear layer in `formats`, by layer name: per channel, or per block for NVFP4."""
    found: dict[str, Tensor | BlockScales] = {}
    for name, form in formats.items():
        weight = vision.model.get_submodule(name).get_parameter("weight")
        found[name] = choose_block_scales(weight) if form.kind is Kind.NVFP4 else choose_step(weight, form)
    return found


_EDGE_BITS = 8


def weight_formats(structure: VitStructure, precision: Precision, edges: str) -> dict[str, WeightFormat]:
    """The weight format of every linear layer.

    Patch embedding and head contain about 1 % of the weights, but errors of the patch embedding affect all later
    layers, and those of the head directly affect the output.

    Args:
        structure: the structure of the model.
        precision: the requested precision.
        edges: `8bit` to keep patch embedding and head at 8 bits, `same` to give them the requested precision. With
            NVFP4 they are always in FP8, as the pixels of a patch do not form blocks.
    """
    if precision.kind is Kind.NVFP4:
        blocks = _block_groups(structure)
        fp8, nvfp4 = WeightFormat(8, Kind.E4M3), WeightFormat(4, Kind.NVFP4)
        return {s.name: nvfp4 if s.input_group in blocks else fp8 for s in structure.linears}
    ends = _ends(structure) if edges == "8bit" else set()
    return {
        site.name: WeightFormat(_EDGE_BITS if site.name in ends else precision.weight_bits, precision.kind)
        for site in structure.linears
    }


def activation_bits(structure: VitStructure, precision: Precision, edges: str) -> dict[str, int]:
    """The bit width of every activation site, including the input image; for `edges` see `weight_formats`."""
    ends = {f"{name}.input" for name in _ends(structure)} if edges == "8bit" else set()
    return {site: _EDGE_BITS if site in ends else precision.activation_bits for site in activation_sites(structure)}


def activation_kinds(structure: VitStructure, precision: Precision) -> dict[str, Kind]:
    """The number format of every activation site.

    With the precision NVFP4, only inputs of linear layers are in NVFP4. Operands of attentions are in FP8, as no engine
    has NVFP4 kernels for them.
    """
    if precision.kind is not Kind.NVFP4:
        return dict.fromkeys(activation_sites(structure), precision.kind)
    blocks = {f"{group}.input" for group in _block_groups(structure)}
    return {site: Kind.NVFP4 if site in blocks else Kind.E4M3 for site in activation_sites(structure)}


def _block_groups(structure: VitStructure) -> set[str]:
    """Input groups of the linear layers that can use NVFP4: whole blocks of inputs, no patch embedding, no head."""
    ends = _ends(structure)
    groups = {site.input_group for site in structure.linears if site.shape[1] % BLOCK == 0}
    return groups - {site.input_group for site in structure.linears if site.name in ends or site.kind != "linear"}


def _ends(structure: VitStructure) -> set[str]:
    return {structure.patch_embed, *structure.heads}
