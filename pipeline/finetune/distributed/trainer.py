"""The training loop in one of several processes: micro-batch i of a step belongs to process i mod W.

All processes know all micro-batches, so each knows the number of answer tokens of the whole step, and which processes
have something to contribute. A process without a micro-batch, or with one without answers, runs a few tokens that no
loss is taken of, as the others need its part of the parameters. What is computed does not depend on W.
"""

from __future__ import annotations

from functools import partial
from typing import Final, Literal

import torch
from torch import Tensor

from fp8pipe.numerics.grids import E4M3
from pipeline.falqon.method import CODES
from pipeline.finetune.checkpoint import Shard, in_shards
from pipeline.finetune.distributed.evaluate import no_batch, shared_heldout_loss
from pipeline.finetune.distributed.group import Group
from pipeline.finetune.distributed.owners import OwnedState, OwnedSteps
from pipeline.finetune.distributed.shard import OrderedSums
from pipeline.finetune.distributed.sharded import ShardedMethod
from pipeline.finetune.distributed.tensors import full_tensors, sharded_like
from pipeline.finetune.loop import Metrics, Trainer, build_optimizer
from pipeline.finetune.loss import answer_count

_STATE: Final = "optimizer/"  # begins the names of an optimizer's tensors in checkpoints


class RankedTrainer(Trainer):
    """`Trainer` of a sharded model in one of several processes.

    `method` is that of the constructor; set `group` and `sums` with `join` before training.
    """

    group: Group
    sums: OrderedSums
    method: ShardedMethod

    def join(self, group: Group, sums: OrderedSums) -> None:
        """Take part in the training of `group`, with the sums of gradients that `shard` returned."""
        self.group, self.sums = group, sums
        self._reached: set[str] = set()
        self._owned: OwnedState | None = None
        if self.config.optimizer != "adamw":
            self.optimizer = OwnedSteps(partial(build_optimizer, self.config), list(self.names), group)

    def accumulate(self) -> tuple[list[Tensor], int, int]:
        """As in one process; gradients and losses are those of all processes."""
        batches = self.micro_batches()
        counts = [answer_count(batch.labels) for batch in batches]
        answers = sum(counts)
        losses = torch.zeros(len(batches), device=self.config.device)
        self.sums.restart()
        self._reached.clear()
        for start in range(0, len(batches), self.group.size):
            present = counts[start : start + self.group.size]
            self.sums.contributors = [rank for rank, count in enumerate(present) if count]
            if not self.sums.contributors:
                continue
            for parameter in self.names:
                parameter.grad = None  # its value is in `sums`
            if self.group.rank in self.sums.contributors:
                with self.method.observed_experts(self._reached.add):
                    losses[start + self.group.rank] = self.backward(batches[start + self.group.rank], answers)
            else:
                self.backward(no_batch(), answers)
        shared = self._share(losses)
        kept = [loss for loss, count in zip(shared, counts, strict=True) if count]
        return kept, answers, sum(batch.tokens for batch in batches)

    def _share(self, losses: Tensor) -> Tensor:
        """The losses of all processes; drops the gradients of experts that no process has reached.

        Those are zero, but an optimizer moves a parameter for a gradient of zero.
        """
        names = self.method.experts
        reached = losses.new_tensor([name in self._reached for name in names])
        found = self.group.total(torch.cat([losses, reached]))
        for name, hits in zip(names, found[len(losses) :].tolist(), strict=True):
            if not hits:
                for parameter in self.method.trained_in(name):
                    parameter.grad = None
        return found[: len(losses)].to(losses.device)

    def clip(self) -> Tensor:
        """As in one process: norms are those of whole gradients, which are gathered for a moment."""
        gradients = [parameter.grad for parameter in self.names if parameter.grad is not None]
        if not gradients:
            return torch.zeros((), device=self.config.device)
        # The operations of `torch.nn.utils.clip_grad_norm_`, which would take the norms of the shards.
        norms = [torch._foreach_norm([whole], 2.0)[0] for whole in full_tensors(gradients)]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(norms), 2.0)
        factor = torch.clamp(self.config.clip_norm / (norm + 1e-6), max=1.0)
        torch._foreach_mul_([gradient.to_local() for gradient in gradients], factor)  # type: ignore[attr-defined]
        return norm

    def heldout_loss(self) -> float:
        """As in one process."""
        return shared_heldout_loss(self.model, self.heldout_batches, self.group, self.method.forward_context())

    def write_metrics(self, lines: list[Metrics], mode: Literal["a", "w"]) -> None:
        """As in one process, in the main process alone."""
        if self.group.rank == 0:
            super().write_metrics(lines, mode)

    def finite(self) -> bool:
        """As in one process."""
        local: list[Tensor] = [parameter.to_local() for parameter in self.names]  # type: ignore[attr-defined]
        bad = sum(int((~torch.isfinite(part)).sum()) for part in local)
        return not int(self.group.total(torch.tensor(bad)))

    def write_checkpoint(self, tensors: dict[str, Tensor]) -> None:
        """Write a checkpoint, in the format of one process, from which any number of processes can continue.

        One file is gathered at a time.
        """
        if isinstance(self.optimizer, OwnedSteps):
            mine = {path: tensor for path, tensor in tensors.items() if path.startswith(_STATE)}
            self._owned = OwnedState(mine, self.names.values(), self.group)
            tensors = {path: tensor for path, tensor in tensors.items() if path not in mine} | self._owned.tensors
        if self.group.rank == 0:
            self.store.save(self.step, tensors, {"history": self.history}, self._whole)
        else:
            for shard in in_shards(tensors):
                self._whole(shard)

    def _whole(self, shard: Shard) -> Shard:
        found: Shard = {}
        for name, whole in zip(shard, full_tensors(list(shard.values())), strict=True):
            if self._owned is not None:
                whole = self._owned.at_main(name, whole)
            if self.group.rank == 0:
                codes = name.endswith(CODES)
                found[name] = (whole.view(E4M3.dtype) if codes else whole).cpu()
        return found

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """As in one process; each process keeps its part of the whole tensors of the checkpoint."""
        parameters = {name: parameter for parameter, name in self.names.items()}
        parts = dict(tensors)
        for path, tensor in tensors.items():
            if path.startswith(_STATE):
                like = parameters[path.removeprefix(_STATE).rpartition("/")[0]]
                if tensor.shape == like.shape and not isinstance(self.optimizer, OwnedSteps):
                    parts[path] = sharded_like(tensor, like)
        super().restore(parts)
