"""The linear layer that trains an adapter on NVFP4 weights: W stays packed in memory, B is live.

W is what an export writes: two E2M1 codes in a byte, an E4M3 scale for 16 inputs of a row, and a power of two as the
global scale of all layers that are stacked. Every number of it is exact in bf16, so the forward pass

    Y = X W^T + O B^T        O = X A^T

computes with the numbers that an engine serves, in bf16 products, as W4A16 kernels do: inputs are not quantized. W is
decoded for each product and freed after it. As in an FP8 layer, O (tokens x r) is saved instead of X, and

    dX = G W + (G B) A       dB = G^T O
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fp8pipe.numerics.grids import E4M3
from fp8pipe.numerics.nvfp4 import BLOCK, e2m1_values, unpack_nibbles
from pipeline.falqon.stacked import StackedLinear


class Nvfp4Linear(StackedLinear):
    """A linear layer `y = x W^T + x A^T B^T + bias` on NVFP4 codes, trainable through B alone.

    Args:
        packed: W's codes, uint8 `(out, in / 2)`; used without copying.
        blocks: W's block scales, float8_e4m3fn `(out, in / 16)`.
        global_scale: W's global scale, a power of two.
        a: A, `(rank, in)`, in the dtype in which the model computes.
        parts: number of rows of each linear layer that is stacked in W; default: a single layer with all rows.
        bias: `(out,)` or None, frozen.

    Raises:
        ValueError: `parts` do not add up to the rows of W.
    """

    packed: Tensor
    block_bytes: Tensor
    a: Tensor

    def __init__(
        self, packed: Tensor, blocks: Tensor, global_scale: float, a: Tensor, *,
        parts: tuple[int, ...] | None = None, bias: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__((packed.shape[0], 2 * packed.shape[1]), a.shape[0], parts, bias, packed.device)
        self.global_scale = global_scale
        self.register_buffer("packed", packed)
        self.register_buffer("block_bytes", blocks.view(torch.uint8))  # which no cast of the module changes
        self.register_buffer("a", a)

    @property
    def blocks(self) -> Tensor:
        """W's block scales, float8_e4m3fn `(out, in / 16)`, a view."""
        return self.block_bytes.view(E4M3.dtype)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """W decoded, `(out, in)`; exact in bf16 and fp32."""
        pairs = _pairs(dtype, self.packed.device)
        # One look-up gives both numbers of a byte, as one integer of twice their width.
        values = pairs.view(_TWICE[dtype]).index_select(0, self.packed.flatten().int()).view(dtype)
        scales = (self.blocks.float() * self.global_scale).to(dtype)
        return (values.view(*scales.shape, BLOCK) * scales.unsqueeze(-1)).flatten(1)

    def product(self, x: Tensor, parts: tuple[int, ...]) -> tuple[Tensor, ...]:
        """See `StackedLinear.product`."""
        outputs: tuple[Tensor, ...] = _Nvfp4Product.apply(x, self.lora_B, self, parts)  # type: ignore[no-untyped-call]
        return outputs

    def extra_repr(self) -> str:
        """Shape, rank and format of the layer, shown when the model is printed."""
        return f"in={self.in_features}, out={'+'.join(map(str, self.parts))}, rank={self.rank}, nvfp4, live"


_TWICE = {torch.bfloat16: torch.int32, torch.float32: torch.int64}


@cache
def _pairs(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The two E2M1 numbers of each byte, `(512,)`."""
    return e2m1_values(unpack_nibbles(torch.arange(256, dtype=torch.uint8).unsqueeze(1))).flatten().to(device, dtype)


class _Nvfp4Product(torch.autograd.Function):
    """Forward and backward of one layer; saves O instead of X for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, b: Tensor, layer: Nvfp4Linear, parts: tuple[int, ...]) -> tuple[Tensor, ...]:
        o = x @ layer.a.to(x.dtype).t()
        y = (x @ layer.weight(x.dtype).t()).addmm_(o, b.to(x.dtype).t())
        ctx.layer = layer
        ctx.save_for_backward(o, b)
        # Detached, so that autograd does not treat them as views: a model may modify one in place (OLMo clips q).
        return tuple(part.detach() for part in y.split(parts, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        o, b = ctx.saved_tensors
        layer: Nvfp4Linear = ctx.layer
        g = grads[0] if len(grads) == 1 else torch.cat(grads, 1)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (g @ layer.weight(g.dtype)).addmm_(g @ b.to(g.dtype), layer.a.to(g.dtype))
        return dx, (g.t() @ o).float(), None, None
