"""Training on NVFP4 weights, and their final merge: the codes and block scales that it chooses are what is exported.

Layers are merged like FP8 ones (`final_merge`): in groups, each with the second moments of inputs that the merged
earlier layers give. Rounding itself is in `fp8pipe.numerics.nvfp4_merge`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fp8pipe.artifact import LayerRecord
from fp8pipe.numerics.nvfp4 import E2M1_MAX, unpack_nibbles
from fp8pipe.numerics.nvfp4_merge import Packed, merge_packed
from fp8pipe.numerics.nvfp4_weights import NEAREST, quantize_packed
from pipeline.falqon.base_files import BaseFiles
from pipeline.falqon.convert import FalqonGroup, convert_to
from pipeline.falqon.final_merge import Inputs, Merged, is_unseen, merge_all, second_moments
from pipeline.falqon.flush import FlushReport
from pipeline.falqon.forms import Nvfp4Form
from pipeline.falqon.nvfp4_layer import Nvfp4Linear
from pipeline.falqon.observed import Losses
from pipeline.falqon.rules import FinalMerge, Initialisation, UpdateRule
from pipeline.finetune.method import Method
from pipeline.finetune.weights import Deployed, Weights

_LARGEST_BLOCK_SCALE = 448.0


class Nvfp4Method(Method):
    """Trains B of layers on NVFP4 weights; `finish` merges it into codes and block scales.

    Args:
        rule: a rule with a live B that is merged at the end only.
        rank: number of rows of A.
        initialisation: how A is initialised.
        seed: seed of the initialisation.
    """

    def __init__(self, rule: UpdateRule, *, rank: int, initialisation: Initialisation, seed: int) -> None:
        self.rule, self.rank, self.initialisation, self.seed = rule, rank, initialisation, seed
        self.groups: list[FalqonGroup[Nvfp4Linear]] = []
        self.layers: dict[str, Nvfp4Linear] = {}

    def prepare(
        self, model: nn.Module, base: BaseFiles | None = None, losses: Losses | None = None
    ) -> list[LayerRecord]:
        """Convert the model in place; for the arguments see `Method.prepare`.

        Raises:
            ConfigurationError: the model cannot be converted (see `convert_to`).
        """
        form = Nvfp4Form(self.rule, next(model.parameters()).dtype)
        settings = self.rule, self.rank, self.initialisation, self.seed
        self.groups, records = convert_to(form, model, *settings, base=base, losses=losses)
        self.layers = {group.name: group.layer for group in self.groups}
        self.names = tuple(name for group in self.groups for name in group.members)
        return records

    def parameters(self) -> dict[str, nn.Parameter]:
        """B of every layer, the only trained tensors."""
        return {f"{name}.lora_B": layer.lora_B for name, layer in self.layers.items()}

    def step_state(self) -> dict[str, Tensor]:
        """B of every layer."""
        return {name: b.detach() for name, b in self.parameters().items()}

    def load_step_state(self, state: dict[str, Tensor]) -> None:
        """Restore `step_state` in place."""
        for name, b in self.parameters().items():
            b.data.copy_(state[name])

    def finish(self, model: nn.Module, inputs: Inputs) -> dict[str, FlushReport]:
        """Merge B with the rule's final merge; returns a report for each layer."""
        return merge_all(model, self.layers, self.rule.final, inputs, merge_group)

    def deployed_weights(self) -> Weights:
        """Codes, block scales and divisors, by module path of the linear layer."""
        weights: Weights = {}
        for group in self.groups:
            layer = group.layer
            parts = zip(layer.packed.split(layer.parts), layer.block_bytes.split(layer.parts), strict=True)
            for name, (packed, blocks) in zip(group.members, parts, strict=True):
                codes, scales = packed.contiguous(), blocks.contiguous().view(layer.blocks.dtype)
                weights[name] = Deployed(codes, scales, False, torch.tensor([1.0 / layer.global_scale]))
        return weights

    def adapter(self) -> dict[str, Tensor]:
        """A and B, for each layer, as `NAME.lora_A` and `.lora_B`."""
        found = {f"{name}.lora_A": layer.a.clone() for name, layer in self.layers.items()}
        return found | {f"{name}.lora_B": layer.lora_B.detach().clone() for name, layer in self.layers.items()}


def merge_group(model: nn.Module, layers: dict[str, Nvfp4Linear], how: FinalMerge, inputs: Inputs) -> Merged:
    """Merge all of B into the weights of some layers; see `pipeline.falqon.final_merge.merge_group`."""
    moments = second_moments(model, layers, inputs) if how is FinalMerge.COMPENSATED else {}
    unseen = [name for name, layer in layers.items() if is_unseen(layer, how, moments.get(name))]
    return {name: merge_layer(layer, moments.get(name)) for name, layer in layers.items()}, unseen


def merge_layer(layer: Nvfp4Linear, moments: Tensor | None) -> FlushReport:
    """Merge all of B into the codes and block scales of a layer, after which B is zero; reports the change.

    The global scale stays as it is.

    Args:
        layer: changed in place.
        moments: `(in, in)` fp32, proportional to X^T X; None rounds to the nearest codes.
    """
    weight = layer.weight(torch.float32)
    target = weight + layer.lora_B.detach().float() @ layer.a.float()
    largest = E2M1_MAX * _LARGEST_BLOCK_SCALE * layer.global_scale
    saturated, target = int((target.abs() > largest).sum()), target.clamp(-largest, largest)
    old = layer.packed
    merged = (
        Packed(*quantize_packed(target, layer.global_scale, NEAREST)) if moments is None
        else merge_packed(target, layer.global_scale, moments, present=layer.blocks)
    )  # fmt: skip
    # New tensors, because the old ones may be mapped from the files of the converted base.
    layer.packed, layer.block_bytes = merged.codes, merged.blocks.view(torch.uint8)
    layer.lora_B.data.zero_()
    intended, applied = target - weight, layer.weight(torch.float32) - weight
    return FlushReport(
        rows=target.shape[0], codes=target.numel(),
        changed=int((unpack_nibbles(old) != unpack_nibbles(merged.codes)).sum()), saturated=saturated,
        intended_square=float(intended.square().sum()), applied_square=float(applied.square().sum()),
        inner=float((intended * applied).sum()),
    )  # fmt: skip
