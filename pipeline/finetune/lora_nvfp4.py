"""LoRA and QLoRA for NVFP4: adapters are trained as always, and the merged weights become codes and block scales."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fp8pipe.artifact import LayerRecord
from pipeline.falqon.base_files import BaseFiles
from pipeline.falqon.convert import read_convertible
from pipeline.falqon.final_merge import Inputs
from pipeline.falqon.flush import FlushReport
from pipeline.falqon.forms import Nvfp4Form
from pipeline.falqon.four_bits import MergedLayers, Trained, merge_into_nvfp4
from pipeline.falqon.observed import Losses
from pipeline.falqon.rules import DEFAULT_RULE, update_rule
from pipeline.finetune.method import LoraMethod
from pipeline.finetune.weights import Weights


class Nvfp4LoraMethod(LoraMethod):
    """LoRA or QLoRA whose result is in NVFP4. For the arguments see `LoraMethod`."""

    _groups: tuple[tuple[str, ...], ...] = ()
    _merged = MergedLayers({}, {})

    def prepare(
        self, model: nn.Module, base: BaseFiles | None = None, losses: Losses | None = None
    ) -> list[LayerRecord]:
        """See `LoraMethod.prepare`; the records tell what will be deployed."""
        self._groups = read_convertible(model, self.rank).input_groups
        weight, inputs = Nvfp4Form(update_rule(DEFAULT_RULE)).encodings()
        return [
            record.model_copy(update={"weight": weight, "activation": inputs}) if record.name in self.names else record
            for record in super().prepare(model, base, losses)
        ]

    def finish(self, model: nn.Module, inputs: Inputs, losses: Losses | None = None) -> dict[str, FlushReport]:
        """Merge the adapters, and replace every trained layer by one in NVFP4; reports nothing.

        Raises:
            ValueError: there are no losses.
        """
        if losses is None:
            raise ValueError("the merge into NVFP4 needs training losses")
        super().finish(model, inputs)
        trained = [trained_layers(model, names) for names in self._groups]
        self._merged = merge_into_nvfp4(model, trained, inputs, losses)
        return self._merged.reports

    def deployed_weights(self) -> Weights:
        """Codes, block scales and divisors, by module path of the linear layer."""
        return self._merged.weights()


def trained_layers(model: nn.Module, names: tuple[str, ...]) -> Trained:
    """Plain linear layers of a model that share an input."""
    layers: list[Any] = [model.get_submodule(name) for name in names]
    weights = [layer.weight.detach() for layer in layers]
    parts, biases = tuple(len(weight) for weight in weights), tuple(layer.bias for layer in layers)
    return Trained(names, parts, weights[0].shape[1], biases, partial(_joined, weights))


def _joined(weights: list[Tensor]) -> Tensor:
    return torch.cat([weight.float() for weight in weights])
