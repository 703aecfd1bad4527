"""FALQON for NVFP4: layers are trained on FP8 codes, and the final merge writes codes and block scales of NVFP4."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from fp8pipe.numerics.backends import backend
from pipeline.falqon.convert import FalqonGroup
from pipeline.falqon.final_merge import Inputs
from pipeline.falqon.flush import FlushReport, target_rows
from pipeline.falqon.forms import Nvfp4Form
from pipeline.falqon.four_bits import MergedLayers, Trained, merge_into_nvfp4
from pipeline.falqon.layer import FalqonLinear
from pipeline.falqon.method import FalqonMethod
from pipeline.falqon.observed import Losses
from pipeline.falqon.rules import FinalMerge
from pipeline.finetune.weights import Weights


class Nvfp4Method(FalqonMethod):
    """Trains B of layers on FP8 codes; `finish` puts layers in NVFP4 in their place. Arguments: `FalqonMethod`."""

    _merged = MergedLayers({}, {})

    def form(self) -> Nvfp4Form:
        """See `FalqonMethod.form`."""
        return Nvfp4Form(self.rule)

    def health(self, step: int) -> None:
        """None, since rounding to FP8 says nothing about a merge into NVFP4."""

    def finish(self, model: nn.Module, inputs: Inputs, losses: Losses | None = None) -> dict[str, FlushReport]:
        """Replace every trained layer by one in NVFP4, with B merged; returns a report for each FALQON layer.

        Raises:
            ValueError: the rule's final merge is compensated, but there are no losses.
        """
        compensated = self.rule.final is FinalMerge.COMPENSATED
        if compensated and losses is None:
            raise ValueError("the compensated merge into NVFP4 needs training losses")
        trained, given = [_trained(group) for group in self.groups], inputs if compensated else None
        self._merged = merge_into_nvfp4(model, trained, given, losses)
        for layer in self.layers.values():
            layer.lora_B.data.zero_()
        return self._merged.reports

    def deployed_weights(self) -> Weights:
        """Codes, block scales and divisors, by module path of the linear layer."""
        return self._merged.weights()


def _trained(group: FalqonGroup) -> Trained:
    layer = group.layer
    biases = [None] * len(group.members) if layer.bias is None else layer.bias.split(layer.parts)
    return Trained(
        group.members, layer.parts, layer.in_features, tuple(biases), partial(_target, layer), partial(_weight, layer)
    )


def _target(layer: FalqonLinear) -> Tensor:
    return target_rows(layer, torch.arange(layer.out_features, device=layer.codes.device)) * layer.scale


def _weight(layer: FalqonLinear) -> Tensor:
    weight: Tensor = backend(layer.codes).decode_units(layer.weight_codes) * layer.scale
    return weight
