"""LoRA and QLoRA on a sharded model: a layer's weight is merged where it is used or saved, and only then.

Frozen weights, A and B are all parameters, which FSDP shards by rows. NF4 weights are packed bytes of one column, so
they are sharded like any others; their block scales (one byte per 64 weights, with double quantization) stay whole
everywhere, in the module. Every layer is gathered as a whole before it is computed with, so nothing that is quantized
in blocks is ever cut.

Merged weights are not kept, as they would be four times as large as those of NF4: after training each forward pass
merges the layers that FSDP has gathered for it, and saving merges one layer after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fp8pipe.artifact import LayerRecord
from fp8pipe.models.language.experts import in_experts
from pipeline.falqon.base_files import BaseFiles
from pipeline.falqon.final_merge import Inputs
from pipeline.falqon.flush import FlushReport
from pipeline.falqon.observed import Losses
from pipeline.finetune.checkpoint import RUN
from pipeline.finetune.distributed.group import Group
from pipeline.finetune.distributed.method import Spilled, left_to_spill, require_shared
from pipeline.finetune.distributed.sharded import ShardedMethod
from pipeline.finetune.distributed.tensors import assign, held_whole, reshard
from pipeline.finetune.method import LoraMethod, merged_weight, replace_layer
from pipeline.finetune.streaming import stop_streaming
from pipeline.finetune.weights import Weights


class ShardedLora(LoraMethod, ShardedMethod):
    """`LoraMethod` in one of several processes; for its arguments see there.

    Args:
        group: the processes.
        folder: the directory of the checkpoints, where the main process writes the merged weights while they are
            collected.
    """

    waits = torch.device("cpu")  # FSDP moves the weights of one decoder layer at a time to the device

    def __init__(self, *, group: Group, folder: Path, **options: Any) -> None:
        super().__init__(**options)
        self.group, self.folder = group, folder
        self.place = torch.device(group.device)
        self.layers: dict[str, Any] = {}  # peft's
        self._model: nn.Module | None = None

    def prepare(
        self, model: nn.Module, base: BaseFiles | None = None, losses: Losses | None = None
    ) -> list[LayerRecord]:
        """As in one process.

        Raises:
            ConfigurationError: the processes do not share the directory of the output.
        """
        require_shared(self.folder, RUN, self.group)
        stop_streaming(model)  # FSDP moves the weights of one decoder layer at a time
        records = super().prepare(model, base, losses)
        self._model = model
        self.layers = {name: model.get_submodule(name) for name in self.names}
        self.experts = tuple(name for name in self.names if in_experts(model, name))
        if self.quantized:
            for layer in self.layers.values():
                _as_bytes(layer.get_base_layer())
        return records

    @contextmanager
    def observed_experts(self, see: Callable[[str], None]) -> Iterator[None]:
        """See `ShardedMethod.observed_experts`."""
        hooks = [
            self.layers[name].register_forward_pre_hook(lambda layer, args, name=name: see(name))
            for name in self.experts
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def trained_in(self, name: str) -> list[nn.Parameter]:
        """A and B of one layer."""
        return [parameter for parameter in self.layers[name].parameters() if parameter.requires_grad]

    def step_state(self) -> dict[str, Tensor]:
        """As in one process, but sharded."""
        assert self._model is not None
        reshard(self._model)  # a forward pass without a backward pass leaves the root's own whole
        return super().step_state()

    def load_step_state(self, state: dict[str, Tensor]) -> None:
        """Restore, in place, this process's rows of the whole tensors of a checkpoint."""
        for name, parameter in self.parameters().items():
            assign(parameter.detach(), state[name])

    def finish(self, model: nn.Module, inputs: Inputs, losses: Losses | None = None) -> dict[str, FlushReport]:
        """From now on the model computes with merged weights, as in one process."""
        for name, layer in self.layers.items():
            replace_layer(model, name, _Merged(layer))
        return {}

    @torch.no_grad()
    def collect(self) -> tuple[Weights, dict[str, Tensor]]:
        """The merged weights, mapped from files in `folder`; empty but in the main process. The adapter is not saved.

        Raises:
            GateFailedError: the processes do not merge to the same bits.
            OutOfMemoryError: the disk has no room for the files.
        """
        assert self._model is not None
        reshard(self._model)
        weights = Spilled(self.folder)
        for name, layer in self.layers.items():
            with held_whole([(module, "weight") for module in _parts(layer)]):
                merged = merged_weight(layer)
            self.group.require_equal({name: merged})
            if self.group.rank == 0:
                weights.add(name, self.deployed(name, merged))
        return weights.mapped(), {}

    def spill_bytes(self) -> int:
        """Bytes of bf16 weights that `collect` has still to write; files of an earlier attempt are replaced."""
        values = sum(layer.in_features * layer.out_features for layer in self.layers.values())
        return left_to_spill(self.folder, values * torch.bfloat16.itemsize)


class _Merged(nn.Module):
    """A layer with an adapter that computes with the merged weight, as the layer would that has it in one process."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        base, weight = self.layer.get_base_layer(), merged_weight(self.layer).to(x.dtype)
        if getattr(base, "quant_state", None) is not None:
            return nn.functional.linear(x, weight, base.bias)
        return cast(Tensor, functional_call(base, {"weight": weight}, (x,)))


def _parts(layer: Any) -> list[nn.Module]:
    """The modules that hold the weights of a layer of peft."""
    return [layer.get_base_layer(), layer.lora_A["default"], layer.lora_B["default"]]


def _as_bytes(base: Any) -> None:
    """Make NF4 weights a plain parameter, which FSDP can shard; bitsandbytes takes their scales from the module."""
    packed = base.weight.data.as_subclass(Tensor)
    base.weight = nn.Parameter(packed, requires_grad=False)
