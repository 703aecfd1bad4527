"""Ranges of few bits, chosen by the error of what is computed from the rounded values instead of their own error.

Attention probabilities and hidden activations have long tails. The range with the smallest squared error of the values
themselves covers the tail, and rounds most of the other values to zero. But an output is a sum over many values, in
which their errors add up, as they all have the same sign. So these ranges are chosen by the error of the product:
probabilities times rounded values, or hidden activations times the next layer's weight. The mean error and a common
factor do not count, since the weights of the next layer are refitted to rounded inputs (`rounding`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from fp8pipe.core.devices import to_device
from fp8pipe.models.vision.attention import explicit_attention, intercept_attention
from fp8pipe.models.vision.prepare import vision_outputs
from fp8pipe.models.vision.quantized import Quantizer
from fp8pipe.models.vision.sources import VisionModel
from fp8pipe.models.vision.structure import VitStructure
from fp8pipe.numerics.kinds import Kind
from fp8pipe.numerics.quantizers import ActivationQuantizer
from pipeline.vit.initialise import range_quantizer

_SHRINKS: Final = tuple(0.97**i for i in range(0, 90, 3))  # factors tried for the largest value, from 1 to 0.07
_ROWS: Final = 512  # inputs of a linear layer that its outputs are compared on
_FEW_BITS: Final = 7  # up to this bit width


@torch.no_grad()
def refine_ranges(
    vision: VisionModel,
    structure: VitStructure,
    activations: Mapping[str, Quantizer],
    bits: Mapping[str, int],
    pixels: Tensor,
) -> dict[str, Quantizer]:
    """Choose the integer ranges of probabilities and hidden activations by the error of outputs.

    Hidden activations are those inputs of linear layers whose range extends at least twice as far in one direction as
    in the other. Sites of 8 bits keep their ranges.

    Args:
        vision: the float model.
        structure: its structure.
        activations: quantizers by activation site.
        bits: bit widths by activation site.
        pixels: normalized pixels `(N, 3, H, W)`, on the model's device.

    Returns:
        Quantizers by activation site; those of other sites are unchanged.
    """
    refined = dict(activations)

    def attend(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        output, site = explicit_attention(q, k, v, mask, scale), f"{name}.probs"
        if (old := _refinable(site, activations, bits)) is not None:
            q, k, v = (_fake(activations, f"{name}.{n}", x) for n, x in (("q", q * scale), ("k", k), ("v", v)))
            logits = q @ k.transpose(-2, -1)
            probs = (logits if mask is None else logits + mask).softmax(-1)
            tried = [range_quantizer(0.0, float(probs.max()) * shrink, bits[site]) for shrink in _SHRINKS]
            refined[site] = _best([old, *tried], lambda quantizer: _merged(quantizer.fake(probs) @ v), _merged(output))
        return output

    def note(group: str, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        site, weight = f"{group}.input", layer.get_parameter("weight").T
        if (old := _refinable(site, activations, bits)) is not None and not _balanced(old):
            rows = _some(args[0].flatten(0, -2).float())
            low, high = min(0.0, float(rows.min())), max(0.0, float(rows.max()))
            tried = [range_quantizer(end, high * shrink, bits[site]) for end in (0.0, low) for shrink in _SHRINKS]
            refined[site] = _best([old, *tried], lambda quantizer: quantizer.fake(rows) @ weight, rows @ weight)

    with ExitStack() as hooks:
        for group in {site.input_group for site in structure.linears if site.kind == "linear"}:
            hooks.enter_context(vision.model.get_submodule(group).register_forward_pre_hook(partial(note, group)))
        hooks.enter_context(intercept_attention(vision.model, structure.attention_names, attend))
        vision_outputs(vision.model, pixels)
    return refined


def relative_error(output: Tensor, wanted: Tensor) -> float:
    """The squared error of outputs `(rows, channels)`, relative to the variance of the wanted ones.

    Means of channels are removed, and the output is multiplied by the factor with the smallest error.
    """
    output, wanted = output - output.mean(0), wanted - wanted.mean(0)
    product, own, variance = ((a * b).sum() for a, b in ((output, wanted), (output, output), (wanted, wanted)))
    return float(1 - product.square() / (own * variance).clamp(min=1e-30))


def _best(
    tried: Iterable[ActivationQuantizer], output_of: Callable[[ActivationQuantizer], Tensor], wanted: Tensor
) -> ActivationQuantizer:
    least, best = math.inf, None
    for quantizer in tried:
        error = relative_error(output_of(quantizer), wanted)
        if best is None or error < least:
            least, best = error, quantizer
    assert best is not None
    return best


def _refinable(site: str, activations: Mapping[str, Quantizer], bits: Mapping[str, int]) -> ActivationQuantizer | None:
    quantizer = activations.get(site)
    few = isinstance(quantizer, ActivationQuantizer) and quantizer.kind is Kind.INT and bits[site] <= _FEW_BITS
    return quantizer if few else None  # type: ignore[return-value]


def _balanced(quantizer: ActivationQuantizer) -> bool:
    return 2 * min(-quantizer.low, quantizer.high) > max(-quantizer.low, quantizer.high)


def _fake(activations: Mapping[str, Quantizer], site: str, x: Tensor) -> Tensor:
    quantizer = activations.get(site)
    return x if quantizer is None else quantizer.fake(x)


def _merged(heads: Tensor) -> Tensor:
    """Reshape `(B, H, N, d)` to `(B * N, H * d)`."""
    return heads.transpose(1, 2).flatten(2).flatten(0, 1)


def _some(rows: Tensor) -> Tensor:
    """A random choice of rows, always the same for a number of rows, drawn on the host."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return rows[to_device(order[:_ROWS], rows.device)]
