"""The end of training for NVFP4, whatever the method: trained weights become codes and block scales, once and for all.

A weight is rounded to four bits once, together with what was learned. If the base were in NVFP4 during training, its
rounding error would be in the result as well as that of the merge. Rounding itself is in
`fp8pipe.numerics.nvfp4_merge`, and the moments under which it minimizes errors are in `guided`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fp8pipe.core.machine import return_freed_memory
from fp8pipe.numerics.nvfp4_merge import Packed, merge_packed
from fp8pipe.numerics.nvfp4_weights import dequantize_packed, global_scale, quantize_packed
from pipeline.falqon.final_merge import Inputs, merge_groups
from pipeline.falqon.flush import FlushReport
from pipeline.falqon.guided import guided_moments, token_weights
from pipeline.falqon.nvfp4_layer import Nvfp4Linear
from pipeline.falqon.observed import Losses
from pipeline.finetune.method import replace_layer
from pipeline.finetune.weights import Deployed, Weights


@dataclass(frozen=True, slots=True)
class Trained:
    """Linear layers with one input, which get one global scale, since engines fuse them.

    Attributes:
        names: their module paths.
        parts: number of rows of each.
        width: number of inputs.
        biases: the bias of each, `(rows,)` or None.
        target: computes the weight that training arrived at, all rows, `(out, in)` fp32.
        untrained: computes the weight before training; None if it is not known.
    """

    names: tuple[str, ...]
    parts: tuple[int, ...]
    width: int
    biases: tuple[Tensor | None, ...]
    target: Callable[[], Tensor]
    untrained: Callable[[], Tensor] | None = None


@dataclass(frozen=True, slots=True)
class MergedLayers:
    """Layers by module path, and a report by the first name of each group whose untrained weight is known."""

    layers: dict[str, Nvfp4Linear]
    reports: dict[str, FlushReport]

    def weights(self) -> Weights:
        """Codes, block scales and divisors, by module path."""
        return {
            name: Deployed(layer.packed.codes, layer.packed.blocks, False, torch.tensor([1.0 / layer.global_scale]))
            for name, layer in self.layers.items()
        }


def merge_into_nvfp4(
    model: nn.Module, trained: Sequence[Trained], inputs: Inputs | None, losses: Losses | None
) -> MergedLayers:
    """Replace trained layers by layers in NVFP4.

    Args:
        model: computes with the trained weights; changed in place.
        trained: its trained layers, in module order.
        inputs: returns the batches of the calibration, and `losses` their losses with autograd graphs; without both,
            weights are rounded to the nearest codes.
        losses: see `inputs`.
    """
    found = MergedLayers({}, {})
    if inputs is None or losses is None:
        for each in trained:
            _merge(model, each, None, found)
        return found
    weights = token_weights(model, [name for each in trained for name in each.names], losses)
    for places in merge_groups([each.width for each in trained]):
        group = [trained[place] for place in places]
        # One number for a token of all layers that share an input, as they share its second moments.
        calls = {each.names[0]: [sum(part) for part in zip(*(weights[name] for name in each.names), strict=True)]
                 for each in group}  # fmt: skip
        moments = guided_moments(model, calls, inputs)
        for each in group:
            _merge(model, each, moments.get(each.names[0]), found)
    return found


@torch.no_grad()
def _merge(model: nn.Module, trained: Trained, moments: Tensor | None, found: MergedLayers) -> None:
    return_freed_memory()  # the solver needs blocks of other sizes than those of activations, or of another layer
    target = trained.target()
    scale = global_scale(float(target.abs().max()))
    packed = Packed(*quantize_packed(target, scale)) if moments is None else merge_packed(target, scale, moments)
    split = packed.codes.split(trained.parts), packed.blocks.split(trained.parts), trained.biases
    for name, codes, blocks, bias in zip(trained.names, *split, strict=True):
        found.layers[name] = Nvfp4Linear(Packed(codes.clone(), blocks.clone()), scale, bias)
        replace_layer(model, name, found.layers[name])
    if trained.untrained is not None:
        found.reports[trained.names[0]] = _report(trained.untrained(), target, packed, scale)


def _report(untrained: Tensor, target: Tensor, packed: Packed, scale: float) -> FlushReport:
    """What training wanted to change, and how what is deployed differs from the untrained weight in NVFP4."""
    alone = dequantize_packed(*quantize_packed(untrained, scale), scale)
    intended, applied = target - untrained, dequantize_packed(*packed, scale) - alone
    return FlushReport(
        rows=target.shape[0], codes=target.numel(), changed=int((applied != 0).sum()),
        intended_square=float(intended.square().sum()), applied_square=float(applied.square().sum()),
        inner=float((intended * applied).sum()),
    )  # fmt: skip
