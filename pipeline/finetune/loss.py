"""The answer loss, in training and on held-out text: cross-entropy on answer tokens alone, without fp32 logits.

Only positions that predict an answer token go through the output head, and the gradient of the logits is formed
chunk by chunk in the forward pass, in the logits' own dtype. For a vocabulary of 50,000 that is most of the
activation memory of a small model, and it is the same for every method.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fp8pipe.models.language.text import IGNORED
from pipeline.finetune.batches import Batch
from pipeline.finetune.compiled import uncompiled

_CHUNK_VALUES = 1 << 23  # fp32 values in flight: 32 MB


class _SummedCrossEntropy(torch.autograd.Function):
    """Sum over rows of -log softmax(logits)[target] / normaliser; targets equal to IGNORED count nothing."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, normaliser: float) -> Tensor:
        total = logits.new_zeros((), dtype=torch.float64)
        grad = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        step = max(1, _CHUNK_VALUES // logits.shape[1])
        for start in range(0, logits.shape[0], step):
            part = slice(start, start + step)
            keep = targets[part] != IGNORED
            picked = targets[part].clamp(min=0).unsqueeze(1)
            log_probs = torch.log_softmax(logits[part].float(), dim=1)
            total -= (log_probs.gather(1, picked).squeeze(1) * keep).sum(dtype=torch.float64)
            if grad is not None:
                chunk = log_probs.exp_()
                chunk.scatter_add_(1, picked, torch.full_like(picked, -1, dtype=chunk.dtype))
                # Normalised before rounding: a factor 1/N applied in bf16 would be off by up to 0.4 %.
                grad[part] = chunk.mul_(keep.unsqueeze(1) / normaliser).to(grad.dtype)
        ctx.grad = grad
        return (total / normaliser).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, None, None]:
        grad, ctx.grad = ctx.grad, None
        return (None if grad is None else grad.mul_(grad_output)), None, None


def answer_loss(model: nn.Module, inputs: dict[str, Tensor], labels: Tensor, normaliser: float = 1.0) -> Tensor:
    """Summed negative log-likelihood (nats) of the answer tokens, divided by `normaliser`.

    In training mode the model's own auxiliary loss is added as its family does, where its configuration asks for one.

    Args:
        model: a causal LM of transformers.
        inputs: `input_ids` `(B, L)` and whatever else the model takes.
        labels: `(B, L)` int64; -100 where the token is no answer. On the CPU, or a GPU is waited for.
        normaliser: usually the answer tokens of the whole optimizer step, micro-batches together.

    Returns:
        fp32 scalar with gradient.
    """
    shifted = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).reshape(-1)
    rows = (shifted != IGNORED).nonzero().squeeze(1)
    device = next(model.parameters()).device
    targets, rows = shifted[rows].to(device), rows.to(device)
    with head_on_rows(model, rows):
        outputs = model(**inputs, use_cache=False)
    logits = outputs.logits
    cross_entropy: Any = _SummedCrossEntropy.apply
    loss: Tensor = cross_entropy(logits.reshape(-1, logits.shape[-1]), targets, normaliser)
    auxiliary = getattr(outputs, "aux_loss", None)
    if not model.training or not isinstance(auxiliary, Tensor):
        return loss
    # A mean already: weighted by this call's share of the answers, so that the calls of a step add up to their mean.
    return loss + _auxiliary_weight(model) * (rows.numel() / normaliser) * auxiliary.to(loss)


def _auxiliary_weight(model: nn.Module) -> float:
    """Weight of the routers' load balancing loss, which models have where `output_router_logits` is set."""
    settings: Any = model.config
    return float(getattr(settings.get_text_config(decoder=True), "router_aux_loss_coef", 0.0))


@contextmanager
def head_on_rows(model: nn.Module, rows: Tensor) -> Iterator[None]:
    """While active, the output head sees the given rows of its flattened input alone, as `(1, rows, hidden)`.

    Selecting at the head's door keeps whatever the model does to its logits afterwards (scaling, soft caps).
    """
    head = model.get_output_embeddings()  # type: ignore[operator]

    def select(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        hidden = args[0]
        return (hidden.reshape(-1, hidden.shape[-1])[rows].unsqueeze(0),)

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def answer_count(labels: Tensor) -> int:
    """Answer tokens that a model can predict: the first token of a sequence has no predictor."""
    return int((labels[:, 1:] != IGNORED).sum())


def model_inputs(batch: Batch, device: torch.device | str) -> dict[str, Tensor]:
    """What the model takes of a batch, on `device`."""
    return {"input_ids": batch.input_ids.to(device), "position_ids": batch.position_ids.to(device)}


@torch.no_grad()
def heldout_loss(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device | str,
    context: AbstractContextManager[Any] | None = None,
) -> float:
    """Mean negative log-likelihood (nats) of an answer token over all batches: the same sum as in training.

    Args:
        model: a causal LM; its training mode is restored afterwards.
        batches: each visited once.
        device: where the model is.
        context: forward context, e.g. autocast.
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    # Uncompiled: another graph for other shapes, without gradients, would take longer than it saves.
    with context or nullcontext(), uncompiled():
        for batch in batches:
            total += float(answer_loss(model, model_inputs(batch, device), batch.labels))
            count += answer_count(batch.labels)
    model.train(was_training)
    return total / max(count, 1)
