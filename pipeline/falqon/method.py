"""FALQON's implementation of the training-method interface (`pipeline.finetune.method.Method`)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor, nn

from fp8pipe.artifact import LayerRecord
from fp8pipe.core.machine import return_freed_memory
from fp8pipe.numerics.kinds import ScaleRule
from pipeline.falqon.base_files import BaseFiles
from pipeline.falqon.convert import FalqonGroup, convert_to
from pipeline.falqon.final_merge import Inputs, merge_all, merge_group
from pipeline.falqon.flush import FlushReport, flush_rows, preview, select_rows
from pipeline.falqon.forms import Fp8Form
from pipeline.falqon.grouped import group_experts
from pipeline.falqon.layer import FalqonLinear
from pipeline.falqon.observed import Losses
from pipeline.falqon.rules import Initialisation, UpdateRule
from pipeline.finetune.method import Method
from pipeline.finetune.weights import Deployed, Weights

CODES: Final = ".codes"  # ends the names of codes in checkpoints
_HEALTH_LAYERS = 8  # approximate number of layers measured per log line, so that it costs only a fraction of a step


class FalqonMethod(Method):
    """Trains B of FALQON layers; `finish` merges it, after which the weights consist of FP8 codes only.

    Args:
        rule: the update rule.
        rank: number of rows of A.
        rows: rows of B that are flushed per layer and step; None means `rank`.
        initialisation: how A is initialised.
        seed: seed of the initialisation and of stochastic rounding.
    """

    place: torch.device | None = None  # where codes wait if they will be sharded

    def __init__(
        self, rule: UpdateRule, *, rank: int, rows: int | None, initialisation: Initialisation, seed: int
    ) -> None:
        self.rule, self.rank, self.initialisation, self.seed = rule, rank, initialisation, seed
        self.exact_casts = rule.scale is ScaleRule.POWER_OF_TWO
        self.rows = rank if rows is None or rule.rank_rows else rows
        self.groups: list[FalqonGroup] = []
        self.layers: dict[str, FalqonLinear] = {}

    def prepare(
        self, model: nn.Module, base: BaseFiles | None = None, losses: Losses | None = None
    ) -> list[LayerRecord]:
        """Convert the model in place; for the arguments see `Method.prepare`.

        Returns:
            One record per linear layer, converted or not.

        Raises:
            ConfigurationError: the model cannot be converted (see `convert_to`).
        """
        settings = self.rule, self.rank, self.initialisation, self.seed
        self.groups, records = convert_to(self.form(), model, *settings, base=base, losses=losses, place=self.place)
        self.layers = {group.name: group.layer for group in self.groups}
        # Elsewhere experts run one by one, and nothing need be copied.
        if self.place is None and next(model.parameters()).is_cuda:
            group_experts(model)
        self.names = tuple(name for group in self.groups for name in group.members)
        return records

    def form(self) -> Fp8Form:
        """What the layers store of their weights, and what the manifest says about them."""
        return Fp8Form(self.rule)

    def parameters(self) -> dict[str, nn.Parameter]:
        """B of every layer, and A if the rule trains it: the only trained tensors."""
        return {f"{name}.{key}": one for name, layer in self.layers.items() for key, one in layer.trained.items()}

    def after_step(self, step: int, measure: bool) -> FlushReport | None:
        """Flush rows of every layer after optimizer step `step`, if the rule flushes every step; round a trained A.

        Returns:
            The summed report, filled in only if `measure`; None if the rule does not flush.
        """
        if self.rule.trains_a:
            self.refresh()
        if not self.rule.flush_every_step:
            return None
        total = FlushReport()
        for index, (name, layer) in enumerate(self.layers.items()):
            # Seeded by step and layer, so that a resumed run, or another process, draws the same numbers.
            generator = torch.Generator().manual_seed(hash((self.seed, step, index)) & 0x7FFFFFFF)
            with self.whole(name, layer):
                total += flush_rows(layer, select_rows(layer, self.rows), self.rule, generator, measure=measure)
        return total

    def refresh(self) -> None:
        """Round every trained A to its codes."""
        for layer in self.layers.values():
            layer.refresh()

    def health(self, step: int) -> FlushReport | None:
        """Report what flushing B with rounding to nearest would do now, for a few layers that change with `step`."""
        total = FlushReport()
        return_freed_memory()  # of the step, in blocks of other sizes
        for name in self.sample(step):
            with self.whole(name, self.layers[name]):
                total += preview(self.layers[name])
        return total

    def sample(self, step: int) -> list[str]:
        """Names of a few layers, which change with `step`."""
        names = list(self.layers)
        stride = max(1, len(names) // _HEALTH_LAYERS)
        return names[step % stride :: stride]

    def step_state(self) -> dict[str, Tensor]:
        """The tensors that training steps change: those that are trained, and codes if the rule flushes every step."""
        state = {name: parameter.detach() for name, parameter in self.parameters().items()}
        if self.rule.flush_every_step:
            state |= {name + CODES: layer.codes for name, layer in self.layers.items()}
        return state

    def load_step_state(self, state: dict[str, Tensor]) -> None:
        """Restore `step_state` in place."""
        for name, parameter in self.parameters().items():
            parameter.data.copy_(state[name])
        self.refresh()
        for name, layer in self.layers.items():
            if self.rule.flush_every_step:
                layer.codes.view(torch.uint8).copy_(state[name + CODES].view(torch.uint8))

    def deployed_weights(self) -> Weights:
        """FP8 codes in the checkpoint's orientation and fp32 scalar scales, by module path of the linear layer."""
        return {name: weight for group in self.groups for name, weight in deployed_of(group).items()}

    def adapter(self) -> dict[str, Tensor]:
        """The codes and scale of A, and B, for each FALQON layer, as `NAME.lora_A`, `.lora_A_scale` and `.lora_B`."""
        return {key: tensor for name, layer in self.layers.items() for key, tensor in adapter_of(name, layer).items()}

    def finish(self, model: nn.Module, inputs: Inputs, losses: Losses | None = None) -> dict[str, FlushReport]:
        """Merge B into the codes with the rule's final merge; returns a report for each FALQON layer."""
        return merge_all(model, self.layers, self.rule.final, inputs, merge_group)

    def whole(self, name: str, layer: FalqonLinear) -> AbstractContextManager[Any]:
        """A context in which `layer`, called `name`, has all of its tensors, which may be changed in place."""
        return nullcontext()


def deployed_of(group: FalqonGroup) -> Weights:
    """The deployed weights of one layer; see `FalqonMethod.deployed_weights`."""
    weights: Weights = {}
    parts = group.layer.weight_codes.view(torch.uint8).split(group.layer.parts)
    for name, part, transposed in zip(group.members, parts, group.transposed, strict=True):
        codes = part.t().contiguous() if transposed else part.contiguous()
        weights[name] = Deployed(codes.view(group.layer.codes.dtype), group.layer.scale.clone(), transposed)
    return weights


def adapter_of(name: str, layer: FalqonLinear) -> dict[str, Tensor]:
    """The adapter of one layer; see `FalqonMethod.adapter`."""
    return {
        f"{name}.lora_A": layer.adapter_codes.clone(),
        f"{name}.lora_A_scale": layer.scale.clone(),
        f"{name}.lora_B": layer.lora_B.detach().clone(),
    }
