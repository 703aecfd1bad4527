"""Reference implementation of FP8 training in torch: it defines what the optimized backends must compute.

Operands are rounded to FP8; the products of their dequantized values are summed in fp32, and the sum is rounded once.
E4M3 and E5M2 codes are exact in bf16 and their products are exact in fp32, so with power-of-two scales a bf16 GEMM of
dequantized operands equals the FP8 GEMM, and torch's own FP8 GEMM, which is slow on a CPU, is not needed.

A matrix of codes [W; A] stacks the rows of a weight W on those of an adapter A. Activations and gradients are quantized
by the same rule as its scale. `power-of-two` uses one scale per row (token), as engines do when serving, so that one
outlier token does not push all others into the subnormal range; `exact` uses one scale per tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8pipe.numerics.grids import E4M3, E5M2, FloatGrid, Scale, quantize
from fp8pipe.numerics.kinds import ScaleRule


class Backend:
    """The operations in torch, correct on every device; optimized backends override some of them."""

    def cast(self, x: Tensor, grid: FloatGrid, rule: ScaleRule, out: Tensor | None = None) -> Tensor:
        """Round `x` `(rows, cols)`, bf16 or fp32, to `grid` with dynamic scales: per row for `power-of-two`, else one.

        Returns:
            The dequantized values: in the dtype of `x` for `power-of-two` (exact), else in fp32. They are written to
            `out` if it is given: `(rows, cols)` with unit column stride, in the result's dtype.
        """
        codes, scale = quantize(x, grid, rule, per_row=rule is ScaleRule.POWER_OF_TWO)
        values = scale.dequantize(codes)
        values = values if rule is ScaleRule.EXACT else values.to(x.dtype)
        return values if out is None else out.copy_(values)

    def decode(self, codes: Tensor, scale: Scale, dtype: torch.dtype) -> Tensor:
        """Dequantize E4M3 codes `(rows, cols)`: to `dtype` (bf16 or fp32) with a power-of-two scale, else to fp32."""
        values = scale.dequantize(codes)
        return values if scale.rule is ScaleRule.EXACT else values.to(dtype)

    def decode_units(self, codes: Tensor) -> Tensor:
        """The values of E4M3 codes (any shape) before scaling, fp32."""
        return codes.float()

    def merge_rows(self, codes: Tensor, rows: Tensor, update: Tensor) -> None:
        """`codes[rows] = round(codes[rows] + update)`, rounded to nearest, in place.

        `codes` are E4M3 `(out, in)`, `rows` distinct int64 indices, and `update` is fp32 `(len(rows), in)`, in units of
        the scale.
        """
        stored = codes.view(torch.uint8)
        merged = E4M3.cast(stored[rows].view(E4M3.dtype).float() + update)
        stored.index_copy_(0, rows, merged.view(torch.uint8))

    def forward(
        self, x: Tensor, codes: Tensor, scale: Scale, rank: int, b: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`Y = X W^T` and `O = X A^T`; if `b` is given, `Y = X W^T + O B^T`.

        Args:
            x: `(tokens, in)`, bf16 or fp32; cast to E4M3.
            codes: [W; A], `(out + rank, in)` E4M3.
            scale: of the codes; a power of two if `b` is given.
            rank: number of rows of A.
            b: B, `(out, rank)` fp32, rounded to the dtype of x.

        Returns:
            Y `(tokens, out)` and O `(tokens, rank)`, in the dtype of x. O shares no memory with Y.
        """
        wide = self._wide_product(x, codes, scale)
        width = codes.shape[0] - rank
        # O is copied, because a view would keep all (T, out + r) values alive until the backward pass.
        o, y = wide[:, width:].clone(), wide[:, :width]
        return (y.contiguous() if b is None else torch.addmm(y, o, b.to(o.dtype).t())), o

    def _wide_product(self, x: Tensor, codes: Tensor, scale: Scale) -> Tensor:
        values = self.cast(x, E4M3, scale.rule)
        return (values @ self.decode(codes, scale, values.dtype).t()).to(x.dtype)  # (T, n) @ (n, m + r)

    def backward(
        self, grad: Tensor, o: Tensor, codes: Tensor, scale: Scale, b: Tensor | None = None, *, wants_input: bool = True
    ) -> tuple[Tensor | None, Tensor]:
        """`dB = G^T O` and `dX = G W`; if `b` is given, `dX = [G | G B] [W; A]`.

        G is cast to E5M2 for the multiplication with W. G B stays in the dtype of G, as do G and O in dB, unless the
        scale rule is `exact`: then G is cast to E5M2 and O to E4M3, with one scale each.

        Args:
            grad: G, `(tokens, out)`, bf16 or fp32.
            o: `(tokens, rank)`, as returned by `forward`.
            codes: as in `forward`.
            scale: as in `forward`.
            b: as in `forward`.
            wants_input: whether to compute dX.

        Returns:
            dX `(tokens, in)` in the dtype of G, or None, and dB `(out, rank)` in fp32.
        """
        width = grad.shape[1]
        if scale.rule is ScaleRule.EXACT:
            g = self.cast(grad, E5M2, scale.rule)
            dx = (g @ self.decode(codes[:width], scale, g.dtype)).to(grad.dtype) if wants_input else None
            return dx, (g.t() @ self.cast(o, E4M3, scale.rule)).float()
        dx = self._input_gradient(grad, codes, scale, b) if wants_input else None
        return dx, (grad.t() @ o).float()  # (m, T) @ (T, r): r is small, so FP8 would save little

    def _input_gradient(self, grad: Tensor, codes: Tensor, scale: Scale, b: Tensor | None) -> Tensor:
        width = grad.shape[1]
        if b is None:
            values, codes = self.cast(grad, E5M2, scale.rule), codes[:width]
        else:  # [G | G B] for a single GEMM
            beside = grad @ b.to(grad.dtype)
            values = grad.new_empty(grad.shape[0], width + b.shape[1])
            self.cast(grad, E5M2, scale.rule, out=values[:, :width])
            values[:, width:] = beside
        return (values @ self.decode(codes, scale, values.dtype)).to(grad.dtype)  # (T, m + r) @ (m + r, n)
