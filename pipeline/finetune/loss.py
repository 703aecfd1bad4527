"""The loss in training and on held-out text: cross-entropy on answer tokens only, without storing fp32 logits.

Only positions that predict an answer token go through the output head, and the gradient of the logits is computed in
chunks during the forward pass, in the logits' own dtype. With a vocabulary of 50,000, logits are most of the activation
memory of a small model. All methods use this loss.
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

_CHUNK_VALUES = 1 << 23  # fp32 values per chunk: 32 MB


class _SummedCrossEntropy(torch.autograd.Function):
    """Sum over rows of -log softmax(logits)[target] / normaliser; rows whose target is IGNORED contribute nothing."""

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

    In training mode the model's own auxiliary loss is added with its usual weight, if the configuration enables one.

    Args:
        model: a causal LM of transformers.
        inputs: `input_ids` `(B, L)` and any other inputs of the model.
        labels: `(B, L)` int64; -100 for tokens that belong to no answer. Best on the CPU: on a GPU, reading them
            would synchronize.
        normaliser: usually the number of answer tokens in all micro-batches of the optimizer step.

    Returns:
        fp32 scalar with its graph.
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
    # The auxiliary loss is a mean: weighted by this call's share of the answer tokens, so that the micro-batches of a
    # step sum to a mean, too.
    return loss + _auxiliary_weight(model) * (rows.numel() / normaliser) * auxiliary.to(loss)


def _auxiliary_weight(model: nn.Module) -> float:
    """Weight of the routers' load-balancing loss, which models compute if `output_router_logits` is set."""
    settings: Any = model.config
    return float(getattr(settings.get_text_config(decoder=True), "router_aux_loss_coef", 0.0))


@contextmanager
def head_on_rows(model: nn.Module, rows: Tensor) -> Iterator[None]:
    """A context in which the output head gets only the given rows of its flattened input, as `(1, rows, hidden)`.

    Selecting at the input of the head keeps everything that the model does to its logits afterwards (scaling, softcap).
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
    """The number of answer tokens that a model can predict, which excludes the first token of a sequence."""
    return int((labels[:, 1:] != IGNORED).sum())


def model_inputs(batch: Batch, device: torch.device | str) -> dict[str, Tensor]:
    """The model's inputs from a batch, on `device`."""
    return {"input_ids": batch.input_ids.to(device), "position_ids": batch.position_ids.to(device)}


@torch.no_grad()
def heldout_loss(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device | str,
    context: AbstractContextManager[Any] | None = None,
) -> float:
    """Mean negative log-likelihood (nats) per answer token over all batches, computed as in training.

    Args:
        model: a causal LM; its training mode is restored afterwards.
        batches: iterated over once.
        device: the model's device.
        context: context of the forward passes, e.g. autocast.
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    # Uncompiled: compiling another graph, without gradients and for other shapes, would cost more time than it saves.
    with context or nullcontext(), uncompiled():
        for batch in batches:
            total += float(answer_loss(model, model_inputs(batch, device), batch.labels))
            count += answer_count(batch.labels)
    model.train(was_training)
    return total / max(count, 1)
