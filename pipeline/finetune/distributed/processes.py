"""Several processes of a run, of which that of rank 0 reads first, writes and prints."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from fp8pipe.artifact import Artifact, open_artifact
from fp8pipe.artifact.writer import partial_of
from pipeline.finetune.batches import Batches
from pipeline.finetune.checkpoint import CheckpointStore
from pipeline.finetune.config import FinetuneConfig, check_processes
from pipeline.finetune.distributed.evaluate import shared_heldout_loss
from pipeline.finetune.distributed.group import Group
from pipeline.finetune.distributed.lora import ShardedLora
from pipeline.finetune.distributed.machines import lay_out
from pipeline.finetune.distributed.method import ShardedFalqon
from pipeline.finetune.distributed.shard import shard
from pipeline.finetune.distributed.sharded import ShardedMethod
from pipeline.finetune.distributed.trainer import RankedTrainer
from pipeline.finetune.loop import Trainer
from pipeline.finetune.method import Method
from pipeline.finetune.processes import Processes, RunWriter, build_method
from pipeline.finetune.weights import Weights

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
_WRITTEN = "written"  # key in the store, set when the artifact is complete


class SeveralProcesses(Processes):
    """`Processes` in one of several."""

    def __init__(self, group: Group) -> None:
        self.group, self.size, self.main = group, group.size, group.rank == 0
        self.facts = {"world_size": group.size}

    def check(self, config: FinetuneConfig) -> None:
        """See `check_processes`."""
        check_processes(config, self.size)

    def in_turn(self, function: Callable[[], T]) -> T:
        """See `Group.in_turn`."""
        return self.group.in_turn(function)

    def same(self, value: T, what: str) -> T:
        """See `Group.require_same`."""
        self.group.require_same(value, what)
        return value

    def writer(self, output: Path, **options: Any) -> RunWriter:
        """The writer of the artifact; in other processes than the main one, an object that writes nothing."""
        return self.group.in_turn(
            lambda: super(SeveralProcesses, self).writer(output, **options) if self.main else _Reader(output)
        )

    def method(self, config: FinetuneConfig, store: CheckpointStore) -> Method:
        """The method on a sharded model."""
        shared: dict[str, Any] = {"group": self.group, "folder": store.root}
        return build_method(config, partial(ShardedFalqon, **shared), partial(ShardedLora, **shared))

    def trainer(
        self, config: FinetuneConfig, model: nn.Module, method: Method, train: Batches, heldout: Batches,
        store: CheckpointStore, metrics_file: Path,
    ) -> Trainer:  # fmt: skip
        """The trainer of the model, which is sharded first."""
        layout = lay_out(model, self.group)
        if layout.replicas > 1:
            self.facts = self.facts | {"replicas": layout.replicas}
            cast(ShardedMethod, method).replicas = layout.replicas
            _LOG.info("each of %d machines holds a replica of the parameters", layout.replicas)
        sums = shard(model, layout.mesh, layout.across)
        trainer = RankedTrainer(config, model, method, train, heldout, store, metrics_file)
        trainer.join(self.group, sums)
        return trainer

    def heldout_loss(self, model: nn.Module, heldout: Batches, device: str) -> float:
        """See `shared_heldout_loss`."""
        return shared_heldout_loss(model, heldout, self.group)

    def results(self, method: Method) -> tuple[Weights, dict[str, Tensor]]:
        """See `ShardedMethod.collect`."""
        return cast(ShardedMethod, method).collect()

    def spill_bytes(self, method: Method) -> int:
        """See `ShardedMethod.spill_bytes`."""
        return cast(ShardedMethod, method).spill_bytes()

    def finished(self, write: Callable[[], Artifact], output: Path) -> Artifact:
        """The artifact, which the main process writes while the others wait."""
        if self.main:
            artifact = write()
            self.group.store.set(_WRITTEN, "done")
            return artifact
        self.group.wait(_WRITTEN)
        return open_artifact(output, verify=False)  # which the main process has just done


class _Reader:
    """In place of the writer of the artifact, in a process that does not write."""

    def __init__(self, output: Path) -> None:
        self.output = Path(output).absolute()
        self.root = partial_of(self.output)

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def warn(self, message: str) -> None:
        """Nothing: the main process warns of the same."""
