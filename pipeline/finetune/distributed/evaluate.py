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
    found = torch.zeros(2, len(heldout), dtype=torch.float64)  # sums of losses, and numbers of answer tokens
    with context or nullcontext(), uncompiled():
        for start in range(0, len(heldout), group.size):
            index = start + group.rank
            batch = heldout.at(index) if index < len(heldout) else no_batch()
            loss = answer_loss(model, model_inputs(batch, group.device), batch.labels)
            if index < len(heldout):
                found[:, index] = torch.tensor([float(loss), answer_count(batch.labels)], dtype=torch.float64)
    model.train(was_training)
    losses, counts = group.total(found)
    return sum(losses.tolist(), 0.0) / max(float(counts.sum()), 1.0)  # added one by one, as in one process
