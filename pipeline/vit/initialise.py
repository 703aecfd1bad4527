"""Initial values of a student: number formats, scales of weights and activations, and weights prepared for rounding.

The range of each activation is the one with the smallest squared rounding error on a sample of its values. The search
shrinks the observed range at both ends together, then at each end separately, because few distributions are symmetric:
GELU's minimum is -0.17, that of probabilities is zero.

Weights are rounded with error compensation (GPTQ, arXiv 2210.17323): columns are rounded one after the other, and the
error of each is compensated in the columns that are not yet rounded, by Optimal Brain Surgeon's update with the second
moments of the layer's inputs. These are the inputs of the deployed layer, rounded to its activation grid. The functions
here return each weight with all compensations, as it was just before it was rounded. Rounding it to nearest gives the
compensated codes; and a student that starts from these unrounded values retains how close each of them is to the next
code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from fp8pipe.core.devices import to_device
from fp8pipe.models.vision.prepare import vision_outputs
from fp8pipe.models.vision.quantized import QuantizedVit, Quantizer, activation_sites
from fp8pipe.models.vision.sources import VisionModel
from fp8pipe.models.vision.structure import VitStructure
from fp8pipe.numerics.grids import E4M3
from fp8pipe.numerics.kinds import Kind, Precision
from fp8pipe.numerics.nvfp4 import BLOCK, BlockQuantizer, BlockScales, choose_block_scales, e2m1_round, tensor_scale
from fp8pipe.numerics.quantizers import (
    INT8_MAX,
    INT8_MIN,
    ActivationQuantizer,
    compensated_round,
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


# Relative to the mean second moment; prevents errors from being moved to input channels that never vary.
_DAMPING: Final = 0.01
_COLUMNS: Final = 64  # columns per block in GPTQ's solver
_NEAREST_FROM_BITS: Final = 8  # from this bit width on, round-to-nearest is accurate enough


def second_moments(
    vision: VisionModel,
    structure: VitStructure,
    activations: Mapping[str, Quantizer],
    batches: Iterable[Tensor],
) -> dict[str, Tensor]:
    """Second moments (mean of x x^T) of the quantized inputs of linear layers, measured on the float model.

    Args:
        vision: the float model.
        structure: its structure.
        activations: quantizers by activation site.
        batches: normalized pixels `(N, 3, H, W)`, on the model's device.

    Returns:
        `(in, in)` fp32 for each group of linear layers with the same input, without the patch embedding.
    """
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys((site.input_group for site in structure.linears if site.kind == "linear"), 0)

    def note(group: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        rows, quantizer = args[0].flatten(0, -2).float(), activations.get(f"{group}.input")
        rows = rows if quantizer is None else quantizer.fake(rows)
        product = rows.T @ rows
        sums[group] = product if group not in sums else sums[group].add_(product)
        counts[group] += rows.shape[0]

    with ExitStack() as hooks, torch.no_grad():
        for group in counts:
            hooks.enter_context(vision.model.get_submodule(group).register_forward_pre_hook(partial(note, group)))
        for pixels in batches:
            vision_outputs(vision.model, pixels)
    return {group: sums[group] / count for group, count in counts.items()}


def compensate(weight: Tensor, step: Tensor | BlockScales, bits: int, moments: Tensor) -> Tensor:
    """A weight matrix with the rounding errors of earlier columns compensated in later ones, not yet rounded.

    Args:
        weight: `(out, in)`.
        step: positive scales `(out,)` fp32 of integer codes, or the block scales of NVFP4.
        bits: bit width of integer codes.
        moments: `(in, in)` second moments of the input.

    Returns:
        `(out, in)` fp32; rounding to nearest gives the compensated codes.
    """
    scales = step.product if isinstance(step, BlockScales) else step.unsqueeze(1)
    width = weight.shape[1] // scales.shape[1]  # columns that share a scale

    def round_column(value: Tensor, column: int) -> Tensor:
        scale = scales[:, column // width]
        units = value / scale
        rounded = e2m1_round(units) if isinstance(step, BlockScales) else nearest_codes(units, *weight_limits(bits))
        return rounded.mul_(scale)

    return compensated_round(
        weight, moments, round_column, block=_COLUMNS, damping=_DAMPING, damping_floor=1e-12, fused=False
    ).before


@torch.no_grad()
def compensate_model(
    model: nn.Module,
    structure: VitStructure,
    formats: Mapping[str, WeightFormat],
    steps: Mapping[str, Tensor | BlockScales],
    moments: Mapping[str, Tensor],
) -> int:
    """Replace the weights of linear layers of fewer than 8 bits with those of `compensate`, in place.

    Args:
        model: the float model; changed in place.
        structure: its structure.
        formats: weight formats by layer.
        steps: weight scales by layer.
        moments: second moments by input group.

    Returns:
        The number of changed layers.
    """
    done = 0
    for site in structure.linears:
        form = formats.get(site.name)
        if form is None or form.kind is Kind.E4M3 or form.bits >= _NEAREST_FROM_BITS or site.input_group not in moments:
            continue
        weight, step = model.get_submodule(site.name).get_parameter("weight"), steps[site.name]
        weight.copy_(compensate(weight, step, form.bits, moments[site.input_group]))
        done += 1
    return done


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
