"""Makes convolutions on CUDA devices deterministic, and computes them in full fp32 precision.

By default, torch lets cuDNN compute fp32 convolutions in TF32 (10 mantissa bits), which changes the output of a patch
embedding in the third digit, and lets it sum gradients in any order. Matrix multiplications need no such setting,
because torch computes them in full fp32 by default.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def plain_convolutions(device: torch.device) -> AbstractContextManager[None]:
    """A context in which convolutions on a CUDA `device` are deterministic and in full fp32; no effect otherwise."""
    if device.type != "cuda":
        return nullcontext()
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
