"""Products on CUDA devices as they are meant here: fp32 in fp32, and the same bits each time they run.

torch lets cuDNN round fp32 convolutions to TF32, ten bits of mantissa, which would change what a patch embedding gives
in its third digit, and lets it add gradients up in any order. Products of matrices are in fp32 by torch's own default.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def plain_convolutions(device: torch.device) -> AbstractContextManager[None]:
    """While it lasts, convolutions on CUDA are in fp32 and repeat bit for bit; does nothing for another `device`."""
    if device.type != "cuda":
        return nullcontext()
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
