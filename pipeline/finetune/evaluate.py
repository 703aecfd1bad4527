"""Held-out answer loss: the same sum over answer tokens as in training, without gradients."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from pipeline.finetune.data import Batch
from pipeline.finetune.loss import answer_count, answer_loss


def model_inputs(batch: Batch, device: torch.device | str) -> dict[str, torch.Tensor]:
    """What the model takes of a batch, on `device`."""
    inputs = {"input_ids": batch.input_ids.to(device), "position_ids": batch.position_ids.to(device)}
    if batch.attention_mask is not None:
        inputs["attention_mask"] = batch.attention_mask.to(device)
    return inputs


@torch.no_grad()
def heldout_loss(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device | str,
    context: AbstractContextManager[Any] | None = None,
) -> float:
    """Mean negative log-likelihood (nats) of an answer token over all batches.

    Args:
        model: a causal LM; its training mode is restored afterwards.
        batches: each visited once.
        device: where the model is.
        context: forward context, e.g. autocast.
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    with context or nullcontext():
        for batch in batches:
            labels = batch.labels.to(device)
            total += float(answer_loss(model, model_inputs(batch, device), labels))
            count += answer_count(labels)
    model.train(was_training)
    return total / max(count, 1)
