"""Convolutions on CUDA devices in full fp32 precision, and deterministic.

By default, torch lets cuDNN compute fp32 convolutions in TF32, with a 10-bit mantissa, which changes the output of a
patch embedding in the third digit, and lets it sum gradients in any order. Matrix multiplications need no such
setting: torch computes them in full fp32 by default.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def plain_convolutions(device: torch.device) -> AbstractContextManager[None]:
    """A context in which CUDA convolutions run in full fp32 and are deterministic; no effect for other devices."""
    if device.type != "cuda":
        return nullcontext()
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
