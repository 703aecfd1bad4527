"""Attention for training on a CPU, as plain GEMMs, because the backward pass of torch's fused kernel is slow there.

The backward pass of torch's CPU flash attention is far slower than the GEMMs it consists of; for short rows it takes a
fifth of a whole training step. Here a layer's scores are computed in the forward pass, freed, and recomputed in the
backward pass, so memory use is that of the fused kernel plus one layer's scores. Query heads that share a key head are
stacked as rows of one GEMM, so keys and values are never repeated. Rows too long for this go to the fused kernel.

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
_PLAIN = {"use_cache", "position_ids", "is_causal"}  # keyword arguments that do not change the formula


class _Attention(torch.autograd.Function):
    """Grouped-query attention; q `(G, R, d)` already scaled, k and v `(G, L, d)`, bias `(G, R, L)` or broadcastable."""

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
    # The mask is the same for every head: for the addition the scores are viewed as (B, heads, L, L).
    scores.view(batch, -1, heads_rows, length).add_(bias.unsqueeze(1))
    return torch.softmax(scores.view(groups, rows, length), -1)


class _Bias:
    """Caches the additive form of the latest mask, as all layers of a forward pass get the same mask object."""

    def __init__(self) -> None:
        self._source: weakref.ref[Tensor] | None = None
        self._bias: Tensor | None = None

    def of(self, mask: Tensor | None, query: Tensor) -> Tensor:
        """`(B or 1, L, L)` in the query's dtype: 0 where a key is visible, the dtype's lowest value elsewhere."""
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
    """transformers' attention interface: query `(B, H, L, d)`, key and value `(B, K, L, d)`; returns `(B, L, H, d)`."""
    batch, heads, length, width = query.shape
    # Only for plain causal self-attention on a CPU whose scores are not too large to materialize.
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
    """Make a transformers model that uses fused attention train with `attend`; returns False if it cannot.

    Args:
        model: on a CPU; only its attention implementation is changed.
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
