"""The held-out loss of a sharded model, whose batches the processes share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from fp8pipe.models.language.text import IGNORED
from pipeline.finetune.batches import ALIGNMENT, Batch, Batches
from pipeline.finetune.compiled import uncompiled
from pipeline.finetune.distributed.group import Group
from pipeline.finetune.loss import answer_count, answer_loss, model_inputs


def no_batch() -> Batch:
    """A row of `ALIGNMENT` tokens without answers, for a process that has no batch but is needed by the others."""
    shape = 1, ALIGNMENT
    positions = torch.arange(ALIGNMENT)[None]
    return Batch(torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED), positions, 0, 0, ())


@torch.no_grad()
def shared_heldout_loss(
    model: nn.Module, heldout: Batches, group: Group, context: AbstractContextManager[Any] | None = None
) -> float:
    """`loss.heldout_loss` over all batches of an epoch; batch i is run by process i mod W."""
    was_training = model.training
    model.eval()
    sums = torch.zeros(len(heldout), dtype=torch.float64)
    with context or nullcontext(), uncompiled():
        for start in range(0, len(heldout), group.size):
            index = start + group.rank
            batch = heldout.at(index) if index < len(heldout) else no_batch()
            loss = answer_loss(model, model_inputs(batch, group.device), batch.labels)
            if index < len(heldout):
                sums[index] = float(loss)
    model.train(was_training)
    # Added one after the other, as in one process.
    count = sum(answer_count(heldout.at(index).labels) for index in range(len(heldout)))
    return sum(group.total(sums).tolist(), 0.0) / max(count, 1)
