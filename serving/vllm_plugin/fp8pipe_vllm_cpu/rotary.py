"""Correct rotary embeddings for tensors with a separate head axis, for which vLLM's CPU kernel is wrong.

The kernel interprets a three-dimensional tensor as (batch, token, feature). Most of vLLM's attention layers pass
(token, feature), but DeepSeek's multi-head latent attention passes (token, head, feature), so from the second position
on, the kernel rotates its queries by the angles of other positions. For such tensors, this module uses vLLM's own
implementation in PyTorch instead of the kernel.
"""

from __future__ import annotations

from torch import Tensor
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

__all__ = ["install"]

_KERNEL = RotaryEmbedding.forward_cpu


def install() -> None:
    """Replace `RotaryEmbedding.forward_cpu`, the method that vLLM calls on a CPU. Idempotent."""
    RotaryEmbedding.forward_cpu = _rotate


def _rotate(
    self: RotaryEmbedding, positions: Tensor, query: Tensor, key: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    apart = any(tensor is not None and tensor.dim() > 2 for tensor in (query, key))
    rotate = RotaryEmbedding.forward_native if apart else _KERNEL
    rotated: tuple[Tensor, Tensor | None] = rotate(self, positions, query, key)
    return rotated
