"""FALQON on a sharded model: a layer is made whole where its codes are merged or saved, and only then."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fp8pipe.artifact import LayerRecord, disk_guard
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.language.experts import in_experts
from pipeline.falqon.base_files import RECORD, BaseFiles
from pipeline.falqon.final_merge import Inputs, merge_all
from pipeline.falqon.flush import FlushReport
from pipeline.falqon.layer import FalqonLinear
from pipeline.falqon.method import CODES, FalqonMethod, adapter_of, deployed_of
from pipeline.falqon.observed import Losses
from pipeline.finetune.distributed.group import Group
from pipeline.finetune.distributed.merge import shared_merge
from pipeline.finetune.distributed.sharded import ShardedMethod
from pipeline.finetune.distributed.tensors import assign, full_tensors, refresh_adapter, reshard, unsharded_layer
from pipeline.finetune.weights import Deployed, Weights

_SPILL_BYTES: Final = 1 << 28  # of codes in memory until they are written
_SPILLED: Final = "deployed-{}.safetensors"


class ShardedFalqon(FalqonMethod, ShardedMethod):
    """`FalqonMethod` in one of several processes; for its arguments see there.

    Args:
        group: the processes.
        folder: where the main process writes the deployed codes while they are collected.
    """

    place = torch.device("cpu")  # FSDP moves the codes of one decoder layer at a time to the device

    def __init__(self, *args: Any, group: Group, folder: Path, **options: Any) -> None:
        super().__init__(*args, **options)
        self.group, self.folder = group, folder
        self._model: nn.Module | None = None
        self._compared: frozenset[str] = frozenset()  # names of layers

    def prepare(
        self, model: nn.Module, base: BaseFiles | None = None, losses: Losses | None = None
    ) -> list[LayerRecord]:
        """As in one process; experts are not grouped, as the groups would hold copies of sharded tensors.

        Raises:
            ConfigurationError: the processes do not share the directory of the output.
        """
        require_shared(self.folder, RECORD, self.group)
        records = super().prepare(model, base, losses)
        self._model = model
        self.experts = tuple(name for name, group in zip(self.layers, self.groups, strict=True)
                             if in_experts(model, group.members[0]))  # fmt: skip
        return records

    @contextmanager
    def observed_experts(self, see: Callable[[str], None]) -> Iterator[None]:
        """See `ShardedMethod.observed_experts`."""
        for name in self.experts:
            self.layers[name].observer = lambda x, name=name: see(name)
        try:
            yield
        finally:
            for name in self.experts:
                self.layers[name].observer = None

    def trained_in(self, name: str) -> list[nn.Parameter]:
        """B of one layer, and A if it is trained."""
        return [*self.layers[name].trained.values()]

    def after_step(self, step: int, measure: bool) -> FlushReport | None:
        """As in one process; in each step that is measured, processes compare what they computed for some layers."""
        self._compared = frozenset(self.sample(step) if measure else ())
        return super().after_step(step, measure)

    def finish(self, model: nn.Module, inputs: Inputs, losses: Losses | None = None) -> dict[str, FlushReport]:
        """As in one process; each layer is merged by one of the processes. Replicas are compared before."""
        self._compared = frozenset(self.layers)
        for name, layer in self.layers.items() if self.replicas > 1 else ():
            with self.whole(name, layer):
                pass
        return merge_all(model, self.layers, self.rule.final, inputs, partial(shared_merge, group=self.group))

    @torch.no_grad()
    def refresh(self) -> None:
        """Round every trained A to those of its codes that this process holds."""
        layers = {layer: layer.lora_A for layer in self.layers.values() if layer.lora_A is not None}
        for layer, whole in zip(layers, full_tensors([*layers.values()]), strict=True):
            refresh_adapter(layer, whole)

    def health(self, step: int) -> FlushReport | None:
        """As in one process."""
        self._compared = frozenset()
        return super().health(step)

    def whole(self, name: str, layer: FalqonLinear) -> AbstractContextManager[Any]:
        """See `unsharded_layer`; what was computed is compared between the processes where that is due."""
        return self._whole(name, layer)

    @contextmanager
    def _whole(self, name: str, layer: FalqonLinear) -> Iterator[None]:
        assert self._model is not None
        if not isinstance(layer.lora_B, DTensor):  # a forward pass without a backward pass leaves the root's own whole
            reshard(self._model)
        with unsharded_layer(layer):
            yield
            if name in self._compared:
                self.group.require_equal({name + CODES: layer.code_bytes, f"{name}.lora_B": layer.lora_B})

    def step_state(self) -> dict[str, Tensor]:
        """As in one process, but sharded."""
        state: dict[str, Tensor] = {name: parameter.detach() for name, parameter in self.parameters().items()}
        if self.rule.flush_every_step:
            state |= {name + CODES: layer.code_bytes.detach() for name, layer in self.layers.items()}
        return state

    def load_step_state(self, state: dict[str, Tensor]) -> None:
        """Restore, in place, this process's rows of the whole tensors of a checkpoint."""
        for name, parameter in self.parameters().items():
            assign(parameter.detach(), state[name])
        if self.rule.trains_a:
            self.refresh()
        for name, layer in self.layers.items():
            if self.rule.flush_every_step:
                assign(layer.code_bytes.detach(), state[name + CODES].view(torch.uint8))

    def collect(self) -> tuple[Weights, dict[str, Tensor]]:
        """The deployed weights, mapped from files in `folder`, and the adapter; empty but in the main process.

        Raises:
            OutOfMemoryError: the disk has no room for the files.
        """
        weights, adapter = Spilled(self.folder), dict[str, Tensor]()
        self._compared = frozenset()
        for group in self.groups:
            with self.whole(group.name, group.layer):
                if self.group.rank == 0:
                    adapter |= {key: tensor.cpu() for key, tensor in adapter_of(group.name, group.layer).items()}
                    for name, weight in deployed_of(group).items():
                        weights.add(name, weight)
        return weights.mapped(), adapter

    def spill_bytes(self) -> int:
        """Bytes of codes that `collect` has still to write to `folder`; files of an earlier attempt are replaced."""
        codes = sum(sum(layer.parts) * layer.in_features for layer in self.layers.values())
        return left_to_spill(self.folder, codes)


def require_shared(folder: Path, file: str, group: Group) -> None:
    """Make sure that the folder is the one in which rank 0 has written `file` before.

    Raises:
        ConfigurationError: it is another one.
    """
    if group.rank and not (folder / file).exists():
        raise ConfigurationError(
            f"{folder} is not the directory that rank 0 has written",
            why=f"it has no {file} in rank {group.rank}, on {platform.node()}",
            fix="give an --output on a file system that all machines share",
        )


def left_to_spill(folder: Path, size: int) -> int:
    """How many of `size` bytes `Spilled` has still to write to `folder`."""
    return max(0, size - sum(file.stat().st_size for file in folder.glob(_SPILLED.format("*"))))


class Spilled:
    """Deployed weights in files, so that they are not in memory all at once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._waiting: Weights = {}
        self._written: Weights = {}

    def add(self, name: str, weight: Deployed) -> None:
        """Keep a weight until there are enough for a file."""
        self._waiting[name] = Deployed(
            weight.values.cpu().clone(), None if weight.scale is None else weight.scale.cpu(), weight.transposed
        )
        if sum(one.values.nbytes for one in self._waiting.values()) >= _SPILL_BYTES:
            self._write()

    def mapped(self) -> Weights:
        """All weights, mapped from their files."""
        if self._waiting:
            self._write()
        return self._written

    def _write(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / _SPILLED.format(f"{len(self._written):05d}")
        codes = {name: weight.values for name, weight in self._waiting.items()}
        with disk_guard(path, sum(values.nbytes for values in codes.values())):
            save_file(codes, path)
        for name, values in load_file(path).items():
            self._written[name] = self._waiting[name]._replace(values=values)
        self._waiting = {}
