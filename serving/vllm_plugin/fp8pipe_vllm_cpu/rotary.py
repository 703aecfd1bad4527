"""Rotary embeddings of tensors that keep their heads apart, which vLLM's CPU kernel rotates wrongly.

The kernel reads a tensor of three dimensions as (batch, token, feature). vLLM's attention layers pass (token, feature)
with few exceptions; DeepSeek's multi-head latent attention passes (token, head, feature), and from the second position
on its queries were rotated by the angles of other positions. Those tensors take vLLM's own implementation in PyTorch.
"""

from __future__ import annotations

from torch import Tensor
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

__all__ = ["install"]

_KERNEL = RotaryEmbedding.forward_cpu


def install() -> None:
    """Replace the method that vLLM calls on a CPU. Idempotent."""
    RotaryEmbedding.forward_cpu = _rotate


def _rotate(
    self: RotaryEmbedding, positions: Tensor, query: Tensor, key: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    apart = any(tensor is not None and tensor.dim() > 2 for tensor in (query, key))
    rotate = RotaryEmbedding.forward_native if apart else _KERNEL
    rotated: tuple[Tensor, Tensor | None] = rotate(self, positions, query, key)
    return rotated
