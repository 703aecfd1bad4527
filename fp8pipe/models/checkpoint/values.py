"""Rejects models with NaN or infinite weights, which no stage can use, before any work is done."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fp8pipe.core.errors import ConfigurationError

__all__ = ["count_not_finite", "refuse_not_finite"]

_CHUNK = 1 << 24  # elements checked at a time, which limits the memory for the masks of a large embedding
_SHOWN = 3


def count_not_finite(tensor: Tensor) -> int:
    """Number of NaN and infinite values in a floating-point tensor; 0 for other dtypes."""
    if not tensor.is_floating_point() or tensor.device.type == "meta" or not tensor.numel():
        return 0
    values = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    if all(bool(end.isfinite()) for end in values.aminmax()):  # one pass; NaN propagates through aminmax
        return 0
    return sum(int((~torch.isfinite(part)).sum()) for part in torch.split(values.reshape(-1), _CHUNK))


def refuse_not_finite(tensors: Iterable[tuple[str, Tensor]], origin: str) -> None:
    """Reject weights with NaN or infinite values.

    Args:
        tensors: (name, tensor) pairs, consumed and checked one at a time.
        origin: the model's name in the error message.

    Raises:
        ConfigurationError: some weights are not finite; the message names the tensors.
    """
    found = [(name, count) for name, tensor in tensors if (count := count_not_finite(tensor.detach()))]
    if found:
        shown = ", ".join(f"{name} ({count} values)" for name, count in found[:_SHOWN])
        raise ConfigurationError(
            f"the weights of {origin} are not finite",
            why=f"NaN or infinity in {len(found)} tensor(s): {shown}{', ...' if len(found) > _SHOWN else ''}",
            fix="fetch the model again, or start from a checkpoint before its training diverged",
        )
