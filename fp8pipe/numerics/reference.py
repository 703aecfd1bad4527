"""The mathematics of FP8 training in torch: what every device computes, and what the fast ones are held to.

Operands are rounded to FP8, and products of what the codes stand for are summed in fp32 and rounded once. E4M3 and E5M2
codes are exact in bf16 and their products exact in fp32, so with power-of-two scales one bf16 GEMM of dequantized
operands is the FP8 GEMM, and torch's own FP8 product, slow on a CPU, is not needed.

A matrix of codes [W; A] holds a weight's rows above those of an adapter A. Activations and gradients follow the rule of
its scale. `power-of-two` has one scale per row (token), as engines do when they serve, so that one outlier token does
not push all others into the subnormals; `exact` has one for all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8pipe.numerics.grids import E4M3, E5M2, FloatGrid, Scale, quantize
from fp8pipe.numerics.kinds import ScaleRule


class Backend:
    """The operations in torch, right on every device; the fast ones replace some."""

    def cast(self, x: Tensor, grid: FloatGrid, rule: ScaleRule, out: Tensor | None = None) -> Tensor:
        """Round `x` `(rows, cols)`, bf16 or fp32, to `grid` with dynamic scales: one, or `power-of-two` one per row.

        Returns:
            The dequantized values: with `power-of-two` in the dtype of `x` (exact), else fp32. They are in `out`, where
            it is given: `(rows, cols)` with unit column stride, of the dtype that the result has.
        """
        codes, scale = quantize(x, grid, rule, per_row=rule is ScaleRule.POWER_OF_TWO)
        values = scale.dequantize(codes)
        values = values if rule is ScaleRule.EXACT else values.to(x.dtype)
        return values if out is None else out.copy_(values)

    def decode(self, codes: Tensor, scale: Scale, dtype: torch.dtype) -> Tensor:
        """E4M3 codes `(rows, cols)` dequantized: with a power-of-two scale in `dtype`, bf16 or fp32, else fp32."""
        values = scale.dequantize(codes)
        return values if scale.rule is ScaleRule.EXACT else values.to(dtype)

    def decode_units(self, codes: Tensor) -> Tensor:
        """E4M3 codes (any shape) as fp32 in code units."""
        return codes.float()

    def merge_rows(self, codes: Tensor, rows: Tensor, update: Tensor) -> None:
        """`codes[rows] = round(codes[rows] + update)` to nearest, in place.

        Of E4M3 codes `(out, in)`, distinct int64 row indices, and `(len(rows), in)` fp32 code units.
        """
        stored = codes.view(torch.uint8)
        merged = E4M3.cast(stored[rows].view(E4M3.dtype).float() + update)
        stored.index_copy_(0, rows, merged.view(torch.uint8))

    def forward(
        self, x: Tensor, codes: Tensor, scale: Scale, rank: int, b: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`Y = X W^T` and `O = X A^T`; with a `b`, `Y = X W^T + O B^T`.

        Args:
            x: `(tokens, in)`, bf16 or fp32; cast to E4M3.
            codes: [W; A], `(out + rank, in)` E4M3.
            scale: of the codes; with a `b` a power of two.
            rank: rows of A.
            b: `(out, rank)` fp32, rounded to the dtype of x.

        Returns:
            Y `(tokens, out)` and O `(tokens, rank)`, in the dtype of x. O shares no memory with Y.
        """
        wide = self._wide_product(x, codes, scale)
        width = codes.shape[0] - rank
        # A copy: the view would keep all (T, out + r) values alive until the backward pass.
        o, y = wide[:, width:].clone(), wide[:, :width]
        return (y.contiguous() if b is None else torch.addmm(y, o, b.to(o.dtype).t())), o

    def _wide_product(self, x: Tensor, codes: Tensor, scale: Scale) -> Tensor:
        values = self.cast(x, E4M3, scale.rule)
        return (values @ self.decode(codes, scale, values.dtype).t()).to(x.dtype)  # (T, n) @ (n, m + r)

    def backward(
        self, grad: Tensor, o: Tensor, codes: Tensor, scale: Scale, b: Tensor | None = None, *, wants_input: bool = True
    ) -> tuple[Tensor | None, Tensor]:
        """`dX = G W`, with a `b` `dX = [G | G B] [W; A]`, and `dB = G^T O`.

        G is cast to E5M2 for the product with W. G B stays in the dtype of G, as do G and O in dB, unless the scale is
        `exact`: then both are cast, G to E5M2 and O to E4M3, one scale each.

        Args:
            grad: G, `(tokens, out)`, bf16 or fp32.
            o: `(tokens, rank)`, as `forward` gave it.
            codes: as in `forward`.
            scale: as in `forward`.
            b: as in `forward`.
            wants_input: whether dX is wanted.

        Returns:
            dX `(tokens, in)` in the dtype of G, or None, and dB `(out, rank)` in fp32.
        """
        width = grad.shape[1]
        if scale.rule is ScaleRule.EXACT:
            g = self.cast(grad, E5M2, scale.rule)
            dx = (g @ self.decode(codes[:width], scale, g.dtype)).to(grad.dtype) if wants_input else None
            return dx, (g.t() @ self.cast(o, E4M3, scale.rule)).float()
        dx = self._input_gradient(grad, codes, scale, b) if wants_input else None
        return dx, (grad.t() @ o).float()  # (m, T) @ (T, r), thin: the activations' own dtype costs nothing extra

    def _input_gradient(self, grad: Tensor, codes: Tensor, scale: Scale, b: Tensor | None) -> Tensor:
        width = grad.shape[1]
        if b is None:
            values, codes = self.cast(grad, E5M2, scale.rule), codes[:width]
        else:  # one product of [G | G B]
            beside = grad @ b.to(grad.dtype)
            values = grad.new_empty(grad.shape[0], width + b.shape[1])
            self.cast(grad, E5M2, scale.rule, out=values[:, :width])
            values[:, width:] = beside
        return (values @ self.decode(codes, scale, values.dtype)).to(grad.dtype)  # (T, m + r) @ (m + r, n)
