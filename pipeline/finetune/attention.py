"""Attention for training on a CPU, computed with plain GEMMs, as the backward pass of torch's fused kernel is slow.

The backward pass of torch's CPU flash attention is far slower than the GEMMs it consists of: for short sequences it
takes a fifth of a whole training step. Here the scores of a layer are computed in the forward pass, freed, and
recomputed in the backward pass, so memory use is that of the fused kernel plus the scores of one layer. Query heads
that share a key head are stacked as rows of one GEMM, so keys and values are never repeated. The fused kernel is still
used for sequences whose scores would take too much memory.

The formula is `softmax(scale Q K^T + mask) V` (arXiv 1706.03762, section 3.2.1).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fp8pipe.models.compat import import_transformers

NAME = "fp8pipe-cpu"
_MAX_SCORES = 1 << 25  # values of one layer's scores: 64 MB in bf16
_PLAIN = {"use_cache", "position_ids", "is_causal"}  # keyword arguments that do not affect the result here


class _Attention(torch.autograd.Function):
    """Grouped-query attention for G = batch size x key heads.

    Its inputs are q `(G, R, d)`, already scaled, whose R rows are the L positions of all query heads that share a key
    head; k and v `(G, L, d)`; and the additive mask `bias`, `(batch size or 1, L, L)`.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, bias)
        return torch.bmm(_probabilities(q, k, bias), v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, bias = ctx.saved_tensors
        (grad,) = grads
        p = _probabilities(q, k, bias)
        dv = torch.bmm(p.transpose(1, 2), grad)
        dp = torch.bmm(grad, v.transpose(1, 2))
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
        return torch.bmm(ds, k), torch.bmm(ds.transpose(1, 2), q), dv, None


def _probabilities(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    groups, rows, _ = q.shape
    scores = torch.bmm(q, k.transpose(1, 2))
    batch, heads_rows, length = bias.shape
    # The mask is the same for every head, so it is added to a view of the scores as (B or 1, heads, L, L).
    scores.view(batch, -1, heads_rows, length).add_(bias.unsqueeze(1))
    return torch.softmax(scores.view(groups, rows, length), -1)


class _Bias:
    """Converts a boolean mask to an additive one, cached because all layers of a forward pass get the same mask."""

    def __init__(self) -> None:
        self._source: weakref.ref[Tensor] | None = None
        self._bias: Tensor | None = None

    def of(self, mask: Tensor | None, query: Tensor) -> Tensor:
        """The additive mask, `(B or 1, L, L)` in the query's dtype: 0 where a key is visible, else the lowest value.

        Args:
            mask: `(B or 1, 1, L, L)` bool, True where a key is visible; None for a causal mask.
            query: `(B, H, L, d)`.
        """
        if mask is None:
            length = query.shape[2]
            return _additive(torch.ones(1, length, length, dtype=torch.bool).tril(), query.dtype)
        if self._source is None or self._source() is not mask or self._bias is None:
            self._source, self._bias = weakref.ref(mask), _additive(mask[:, 0], query.dtype)
        return self._bias


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)


_BIAS = _Bias()


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function for transformers' `AttentionInterface`.

    Args:
        module: the attention layer.
        query: `(B, H, L, d)`.
        key: `(B, K, L, d)`, where K divides H.
        value: `(B, K, L, d)`.
        attention_mask: `(B or 1, 1, L, L)` bool, True where a key is visible; None for causal attention.
        dropout: dropout probability.
        scaling: factor of the scores; default: `d ** -0.5`.
        **kwargs: other options of transformers; those with an effect are left to the fused kernel.

    Returns:
        The output, `(B, L, H, d)`, and None in place of the attention weights.
    """
    batch, heads, length, width = query.shape
    # Anything but plain self-attention on a CPU with scores of limited size is left to the fused kernel.
    fits = (
        query.device.type == "cpu"
        and dropout == 0.0
        and key.shape[2] == length
        and value.shape == key.shape
        and batch * heads * length * length <= _MAX_SCORES
        and kwargs.get("is_causal") in (None, True)
        and all(name in _PLAIN or not value for name, value in kwargs.items() if value is not None)
    )
    if attention_mask is None:
        fits = fits and getattr(module, "is_causal", True)
    else:
        fits = fits and attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1
    if not fits:
        fused: Any = import_transformers().AttentionInterface()["sdpa"]
        done: tuple[Tensor, None] = fused(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return done
    if torch.is_autocast_enabled("cpu"):
        # Casts its products here, but not those of the backward pass, which would get queries of another dtype than
        # values if the model is in fp32: rotary embeddings make fp32 of what the projections gave.
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    groups = key.shape[1]
    scale = width**-0.5 if scaling is None else scaling
    fold = (batch * groups, heads // groups * length, width)
    apply: Any = _Attention.apply
    output: Tensor = apply(
        (query * scale).reshape(fold), key.reshape(-1, length, width), value.reshape(-1, length, width),
        _BIAS.of(attention_mask, query),
    )  # fmt: skip
    return output.view(batch, heads, length, width).transpose(1, 2).contiguous(), None


def use_matmul_attention(model: nn.Module) -> bool:
    """Switch a transformers model from fused attention (`sdpa`) to `attend`.

    Args:
        model: on a CPU; only its attention implementation is changed.

    Returns:
        False, with the model unchanged, if it does not use `sdpa` or does not support other implementations.
    """
    transformers = import_transformers()
    pretrained: Any = model
    fused = getattr(getattr(model, "config", None), "_attn_implementation", None) == "sdpa"
    if not (fused and getattr(pretrained, "_supports_attention_backend", False)):
        return False
    transformers.AttentionInterface.register(NAME, attend)
    transformers.AttentionMaskInterface.register(NAME, transformers.AttentionMaskInterface()["sdpa"])
    pretrained.set_attn_implementation(NAME)
    return True
