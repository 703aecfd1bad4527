"""The loss for training and held-out text: cross-entropy on answer tokens only, without storing fp32 logits.

With a vocabulary of 50,000, the logits take most of a small model's activation memory. Therefore only positions that
predict an answer token go through the output head, and the gradient of the logits is computed chunk by chunk in the
forward pass and stored in the dtype of the logits. All methods use this loss.
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
    """Sum over rows of -log softmax(logits)[target] / normaliser; rows whose target is IGNORED are left out.

    Its inputs are `logits` (rows, V), `targets` (rows,) int64 and a number `normaliser`; the result is an fp32 scalar.
    """

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
                # Divided by N before rounding to bf16, as a factor 1/N in bf16 would have an error of up to 0.4 %.
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

    In training mode, the model's auxiliary loss (load balancing of experts) is added with the weight from the model's
    configuration, if that configuration enables it.

    Args:
        model: a causal LM of transformers.
        inputs: `input_ids` `(B, L)` int64 and any other inputs of the model, on its device.
        labels: `(B, L)` int64, not shifted; -100 for tokens outside answers. They should be on the CPU, as selecting
            positions by labels on a GPU needs a synchronization.
        normaliser: usually the number of answer tokens in all micro-batches of the optimizer step.

    Returns:
        An fp32 scalar with its autograd graph.
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
    # The auxiliary loss is a mean, so it is weighted by this micro-batch's share of the step's answer tokens: the sum
    # over all micro-batches is then a mean, too.
    return loss + _auxiliary_weight(model) * (rows.numel() / normaliser) * auxiliary.to(loss)


def _auxiliary_weight(model: nn.Module) -> float:
    """Weight of the load-balancing loss of expert routers, which models return if `output_router_logits` is set."""
    settings: Any = model.config
    return float(getattr(settings.get_text_config(decoder=True), "router_aux_loss_coef", 0.0))


@contextmanager
def head_on_rows(model: nn.Module, rows: Tensor) -> Iterator[None]:
    """A context in which the output head computes logits for selected positions only.

    The selection is made at the input of the head, so whatever the model does to its logits afterwards (scaling,
    softcapping) still applies.

    Args:
        model: a causal LM of transformers; its logits have shape `(1, len(rows), V)` in the context.
        rows: int64 indices into the flattened `(B * L)` positions, on the model's device.
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
    """The number of answer tokens in `labels` `(B, L)` that enter the loss; the first token of a row never does."""
    return int((labels[:, 1:] != IGNORED).sum())


def model_inputs(batch: Batch, device: torch.device | str) -> dict[str, Tensor]:
    """The keyword arguments of a model for a batch, on `device`: `input_ids`, and `position_ids` or those of images.

    Models derive the positions of image tokens themselves, from the sizes of the images.
    """
    others = {"position_ids": batch.position_ids} if batch.image_inputs is None else batch.image_inputs()
    return {key: value.to(device) for key, value in {"input_ids": batch.input_ids, **others}.items()}


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
        context: context of the forward passes, such as autocast; None for none.

    Returns:
        The loss; 0 if there are no answer tokens.
    """
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    # Layers run uncompiled: compiling them without gradients and for other shapes would cost more time than it saves.
    with context or nullcontext(), uncompiled():
        for batch in batches:
            total += float(answer_loss(model, model_inputs(batch, device), batch.labels))
            count += answer_count(batch.labels)
    model.train(was_training)
    return total / max(count, 1)
