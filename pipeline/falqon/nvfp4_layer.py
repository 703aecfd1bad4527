"""A linear layer in NVFP4 as an engine serves it: what the final merge puts in the place of a trained layer."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from fp8pipe.numerics.grids import E4M3
from fp8pipe.numerics.nvfp4 import BLOCK, e2m1_values, unpack_nibbles
from fp8pipe.numerics.nvfp4_merge import Packed


class Nvfp4Linear(nn.Module):
    """`y = x W^T + bias` with W in NVFP4, in the dtype of x, as in W4A16 kernels: inputs are not quantized.

    Args:
        packed: W's codes and block scales.
        global_scale: W's global scale, a power of two.
        bias: `(out,)` or None.
    """

    codes: Tensor
    block_bytes: Tensor
    bias: Tensor | None

    def __init__(self, packed: Packed, global_scale: float, bias: Tensor | None = None) -> None:
        super().__init__()
        self.global_scale = global_scale
        self.register_buffer("codes", packed.codes)
        self.register_buffer("block_bytes", packed.blocks.view(torch.uint8))  # which no cast of the module changes
        self.register_buffer("bias", bias)

    @property
    def packed(self) -> Packed:
        """Codes, uint8 `(out, in / 2)`, and block scales, float8_e4m3fn `(out, in / 16)`; views."""
        return Packed(self.codes, self.block_bytes.view(E4M3.dtype))

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """W decoded, `(out, in)`; exact in bf16 and fp32."""
        pairs = _pairs(dtype, self.codes.device)
        # One look-up gives both numbers of a byte, as one integer of twice their width.
        values = pairs.view(_TWICE[dtype]).index_select(0, self.codes.flatten().int()).view(dtype)
        scales = (self.packed.blocks.float() * self.global_scale).to(dtype)
        return (values.view(*scales.shape, BLOCK) * scales.unsqueeze(-1)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `(..., in)` in bf16 or fp32; returns `(..., out)` in the same dtype."""
        return nn.functional.linear(x, self.weight_in(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """Shape and format of the layer, shown when the model is printed."""
        return f"in={2 * self.codes.shape[1]}, out={self.codes.shape[0]}, nvfp4"


_TWICE = {torch.bfloat16: torch.int32, torch.float32: torch.int64}


@cache
def _pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The two E2M1 numbers of each byte, `(512,)`."""
    return e2m1_values(unpack_nibbles(torch.arange(256, dtype=torch.uint8).unsqueeze(1))).flatten().to(device, dtype)
