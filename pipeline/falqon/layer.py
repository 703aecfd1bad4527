"""The FALQON linear layer: FP8 weights W and the adapter's A in one matrix, so that one GEMM computes both products.

`codes` is M = [W; A] in E4M3, shape (out + r, in), with one scale. The forward pass is the FP8 GEMM
`X [W; A]^T = [Y | O_A]`. Instead of the input X, only the thin O_A = X A^T is saved for the backward pass, in which G
is the gradient of Y:

    dX = G W            (FP8, G cast to E5M2)
    dB = G^T O_A        (B, out x r, is the only trainable tensor; no dW is ever computed)

In the paper (section 4 of arXiv 2510.24061) and its released code, B is not used in the forward pass but merged into
W's codes after each optimizer step, so the update of a single step must survive rounding to FP8. In a `live` layer, B
takes part in the forward pass until it is merged:

    Y  = X W^T + O_A B^T            dX = [G | G B] [W; A]

The two extra products, O_A B^T and G B, have a dimension of only r, and dX is still one GEMM. This is LoRA with a
frozen A; the update accumulates in B until it is large enough to survive rounding. X is not saved in this case either.

If A is trained, too, the layer has an fp32 copy of it for the optimizer, which is rounded to A's codes after each step
(`refresh`). Then X is saved as it was rounded to FP8:

    dA = (G B)^T X
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fp8pipe.numerics.backends import backend
from fp8pipe.numerics.grids import E4M3, Scale
from fp8pipe.numerics.kinds import ScaleRule


class FalqonLinear(nn.Module):
    """A linear layer `y = x W^T (+ x A^T B^T) + bias` on FP8 codes, trainable through B, or through A and B.

    Args:
        codes: `(out + rank, in)` float8_e4m3fn, W's rows first; used without copying.
        scale: the scalar scale of all codes; its rule also applies to activations and gradients.
        rank: number of rows of A.
        parts: number of rows of each linear layer that is stacked in W; default: a single layer with all rows.
        bias: `(out,)` or None, frozen.
        live: whether B takes part in the forward pass.
        trains_a: whether A is trained, too.

    Raises:
        ValueError: `parts` do not add up to the rows of W, the layer is live but its scales are not powers of two, or
            A is to be trained but the layer is not live.
    """

    code_bytes: Tensor
    scale: Tensor
    inverse_scale: Tensor | None
    columns: Tensor | None
    one: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scale: Scale,
        *,
        rank: int,
        parts: tuple[int, ...] | None = None,
        bias: Tensor | None = None,
        live: bool = True,
        trains_a: bool = False,
    ) -> None:
        super().__init__()
        self.rank, self.live = rank, live
        self.out_features, self.in_features = codes.shape[0] - rank, codes.shape[1]
        self.parts = parts or (self.out_features,)
        self.observer: Callable[[Tensor], None] | None = None  # called with every input, `(tokens, in)`
        if sum(self.parts) != self.out_features:
            raise ValueError(f"parts {self.parts} do not add up to {self.out_features} rows")
        if live and scale.rule is ScaleRule.EXACT:
            raise ValueError("a live layer needs power-of-two scales: B's products share a buffer with FP8 values")
        if trains_a and not live:
            raise ValueError("without B in the forward pass, A has no gradient")
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=codes.device))
        # A parameter, as FSDP shards no buffers; of bytes, as DTensor cannot gather float8.
        self.code_bytes = nn.Parameter(codes.view(torch.uint8), requires_grad=False)
        self.register_buffer("scale", scale.value)
        self.register_buffer("inverse_scale", scale.inverse_scale)
        # The scale, repeated for each column of a GEMM (padded to a multiple of 16); cached, as it never changes.
        columns = None if scale.inverse_scale is not None else scale.value.expand(max(codes.shape) + 15).contiguous()
        self.register_buffer("columns", columns, persistent=False)
        self.register_buffer("one", None if columns is None else torch.ones_like(scale.value), persistent=False)
        a = codes[self.out_features :].float() * scale.value if trains_a else None
        self.lora_A = None if a is None else nn.Parameter(a)

    @property
    def codes(self) -> Tensor:
        """M = [W; A], `(out + rank, in)` float8_e4m3fn, a view of `code_bytes`."""
        return self.code_bytes.view(E4M3.dtype)

    @property
    def code_scale(self) -> Scale:
        """The scale that W's and A's codes share."""
        return Scale(self.scale, self.inverse_scale, self.columns, self.one)

    @property
    def weight_codes(self) -> Tensor:
        """W's codes, `(out, in)` float8_e4m3fn, a view."""
        return self.codes[: self.out_features]

    @property
    def adapter_codes(self) -> Tensor:
        """A's codes, `(rank, in)` float8_e4m3fn, a view; they have the same scale as W's."""
        return self.codes[self.out_features :]

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name: B `(out, rank)`, and A `(rank, in)` if it is trained; fp32."""
        return {"lora_B": self.lora_B} | ({} if self.lora_A is None else {"lora_A": self.lora_A})

    @torch.no_grad()
    def refresh(self) -> None:
        """Round a trained A to its codes; values beyond the range of the codes are set to its end."""
        if self.lora_A is not None:
            self.lora_A.clamp_(-E4M3.max * self.scale, E4M3.max * self.scale)
            self.adapter_codes.view(torch.uint8).copy_(E4M3.cast(self.lora_A / self.scale).view(torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to `(..., in)` in bf16 or fp32; returns `(..., out)` in the same dtype."""
        (y,) = self.forward_parts(x, (self.out_features,))
        return y

    def forward_parts(self, x: Tensor, parts: tuple[int, ...]) -> tuple[Tensor, ...]:
        """Like `forward`, but with the output split along its last dimension into the widths `parts`.

        Without a bias, the returned tensors share one buffer.
        """
        flat = x.reshape(-1, self.in_features)
        if self.observer is not None:
            self.observer(flat)
        product = _FalqonProduct if self.lora_A is None else _BothProduct
        outputs: tuple[Tensor, ...] = product.apply(flat, self, parts, *self.trained.values())  # type: ignore[no-untyped-call]
        if self.bias is not None:
            outputs = tuple(y + b for y, b in zip(outputs, self.bias.split(parts), strict=True))
        return tuple(y.view(*x.shape[:-1], width) for y, width in zip(outputs, parts, strict=True))

    def extra_repr(self) -> str:
        """Shape, rank, format and mode of the layer, shown when the model is printed."""
        mode = "live" if self.live else "merged"
        out = "+".join(map(str, self.parts))
        return f"in={self.in_features}, out={out}, rank={self.rank}, e4m3, {self.code_scale.rule}, {mode}"


class _FalqonProduct(torch.autograd.Function):
    """Forward and backward of one layer; saves O_A instead of X for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FalqonLinear, parts: tuple[int, ...], b: Tensor) -> tuple[Tensor, ...]:
        y, o = backend(x).forward(x, layer.codes, layer.code_scale, layer.rank, b if layer.live else None)
        ctx.layer = layer
        ctx.save_for_backward(o, b)
        # Detached, so that autograd does not treat them as views: a model may modify one in place (OLMo clips q).
        return tuple(part.detach() for part in y.split(parts, 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor]:
        o, b = ctx.saved_tensors
        layer: FalqonLinear = ctx.layer
        grad = _joined(grads)
        dx, db = backend(grad).backward(
            grad, o, layer.codes, layer.code_scale, b if layer.live else None, wants_input=ctx.needs_input_grad[0]
        )
        return dx, None, None, db


class _BothProduct(torch.autograd.Function):
    """Forward and backward of one layer whose A is trained, too; saves X as it was rounded, and O_A."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layer: FalqonLinear, parts: tuple[int, ...], b: Tensor, a: Tensor
    ) -> tuple[Tensor, ...]:
        y, o, kept = backend(x).forward_keeping(x, layer.codes, layer.code_scale, layer.rank, b)
        ctx.layer = layer
        ctx.save_for_backward(o, b, *kept)
        return tuple(part.detach() for part in y.split(parts, 1))  # see `_FalqonProduct`

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor]:
        o, b, *kept = ctx.saved_tensors
        layer: FalqonLinear = ctx.layer
        grad = _joined(grads)
        dx, db, da = backend(grad).backward_both(
            grad, o, tuple(kept), layer.codes, layer.code_scale, b, wants_input=ctx.needs_input_grad[0]
        )
        return dx, None, None, db, da


def _joined(grads: tuple[Tensor, ...]) -> Tensor:
    return grads[0].contiguous() if len(grads) == 1 else torch.cat(grads, 1)
