"""Reference implementation of FP8 training in torch, which defines what the optimized backends must compute.

Operands are rounded to FP8, the products of their dequantized values are summed in fp32, and the sum is rounded once.
E4M3 and E5M2 codes are exact in bf16, and their products are exact in fp32. With power-of-two scales, a bf16 GEMM of
dequantized operands is therefore equal to the FP8 GEMM, and is used because torch's FP8 GEMM is slow on a CPU.

The rows of a weight W and of an adapter's matrix A are stored in one matrix of codes, [W; A], with one scale; the
adapter's other matrix is B. Activations and gradients are quantized by the rule of that scale. `power-of-two` uses one
scale per row (token), as engines do, so that one token with large values does not push all others into the subnormal
range; `exact` uses one scale per tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8pipe.numerics.grids import E4M3, E5M2, FloatGrid, Scale, quantize
from fp8pipe.numerics.kinds import ScaleRule


class Backend:
    """The operations of FP8 training, written in torch for any device; optimized backends override some of them."""

    def cast(self, x: Tensor, grid: FloatGrid, rule: ScaleRule, out: Tensor | None = None) -> Tensor:
        """Quantize and dequantize a matrix, with scales computed from its values.

        Args:
            x: `(rows, cols)`, bf16 or fp32.
            grid: the grid to round to.
            rule: the rule for the scales: `power-of-two` uses one per row, `exact` one for the whole matrix.
            out: tensor to write the result to, `(rows, cols)` with unit column stride in the dtype of the result.

        Returns:
            The dequantized values: for `power-of-two` in the dtype of `x`, which represents them exactly, else in fp32.
        """
        codes, scale = quantize(x, grid, rule, per_row=rule is ScaleRule.POWER_OF_TWO)
        values = scale.dequantize(codes)
        values = values if rule is ScaleRule.EXACT else values.to(x.dtype)
        return values if out is None else out.copy_(values)

    def decode(self, codes: Tensor, scale: Scale, dtype: torch.dtype) -> Tensor:
        """Dequantize E4M3 codes `(rows, cols)`, to `dtype` (bf16 or fp32) with a power-of-two scale, else to fp32."""
        values = scale.dequantize(codes)
        return values if scale.rule is ScaleRule.EXACT else values.to(dtype)

    def decode_units(self, codes: Tensor) -> Tensor:
        """The values of E4M3 codes (any shape) without their scale, fp32."""
        return codes.float()

    def merge_rows(self, codes: Tensor, rows: Tensor, update: Tensor) -> None:
        """Add an update to some rows of codes, in place: `codes[rows] = round(codes[rows] + update)`, to nearest.

        Args:
            codes: E4M3, `(out, in)`.
            rows: distinct indices of rows, int64.
            update: `(len(rows), in)` fp32, already divided by the scale.
        """
        stored = codes.view(torch.uint8)
        merged = E4M3.cast(stored[rows].view(E4M3.dtype).float() + update)
        stored.index_copy_(0, rows, merged.view(torch.uint8))

    def forward(
        self, x: Tensor, codes: Tensor, scale: Scale, rank: int, b: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compute `Y = X W^T` and `O = X A^T`; if `b` is given, `Y = X W^T + O B^T`.

        Args:
            x: X, `(tokens, in)`, bf16 or fp32; it is quantized to E4M3.
            codes: E4M3 codes of [W; A], `(out + rank, in)`.
            scale: scale of the codes; must be a power of two if `b` is given.
            rank: number of rows of A.
            b: B, `(out, rank)` fp32; it is rounded to the dtype of `x`.

        Returns:
            Y `(tokens, out)` and O `(tokens, rank)`, in the dtype of x. O shares no memory with Y.
        """
        y, o, _ = self.forward_keeping(x, codes, scale, rank, b)
        return y, o

    def forward_keeping(
        self, x: Tensor, codes: Tensor, scale: Scale, rank: int, b: Tensor | None = None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Like `forward`, but returns also X as it was quantized, in the form that `backward_both` takes."""
        values = self.cast(x, E4M3, scale.rule)
        wide = (values @ self.decode(codes, scale, values.dtype).t()).to(x.dtype)  # (T, n) @ (n, m + r)
        width = codes.shape[0] - rank
        # O is copied, because a view would keep all (T, out + r) values alive until the backward pass.
        o, y = wide[:, width:].clone(), wide[:, :width]
        return (y.contiguous() if b is None else torch.addmm(y, o, b.to(o.dtype).t())), o, (values,)

    def backward(
        self, grad: Tensor, o: Tensor, codes: Tensor, scale: Scale, b: Tensor | None = None, *, wants_input: bool = True
    ) -> tuple[Tensor | None, Tensor]:
        """Compute the gradients `dB = G^T O` and `dX = G W`; if `b` is given, `dX = [G | G B] [W; A]`.

        G is quantized to E5M2 for the multiplication with W; G B stays in the dtype of G. For dB, G and O are not
        quantized, unless the scale rule is `exact`: then G is quantized to E5M2 and O to E4M3, with one scale each.

        Args:
            grad: G, the gradient of Y, `(tokens, out)`, bf16 or fp32.
            o: O as returned by `forward`, `(tokens, rank)`.
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
        beside = None if b is None or not wants_input else self._beside(grad, scale, b)
        dx = self._input_gradient(grad, codes, scale, beside) if wants_input else None
        return dx, (grad.t() @ o).float()  # (m, T) @ (T, r): r is small, so FP8 would save little

    def backward_both(
        self,
        grad: Tensor,
        o: Tensor,
        kept: tuple[Tensor, ...],
        codes: Tensor,
        scale: Scale,
        b: Tensor,
        *,
        wants_input: bool = True,
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Like `backward` with B, but computes also `dA = (G B)^T X`, with X as it was quantized.

        Args:
            grad: as in `backward`.
            o: as in `backward`.
            kept: as returned by `forward_keeping`.
            codes: as in `forward`.
            scale: as in `forward`; must be a power of two.
            b: as in `forward`.
            wants_input: whether to compute dX.

        Returns:
            dX and dB as in `backward`, and dA `(rank, in)` in fp32.
        """
        beside = self._beside(grad, scale, b)
        dx = self._input_gradient(grad, codes, scale, beside) if wants_input else None
        return dx, (grad.t() @ o).float(), self._adapter_gradient(beside, kept, scale)

    def _beside(self, grad: Tensor, scale: Scale, b: Tensor) -> Tensor:
        """G B, `(tokens, rank)` in the dtype of G; backends may include a factor that `_adapter_gradient` takes out."""
        return grad @ b.to(grad.dtype)

    def _adapter_gradient(self, beside: Tensor, kept: tuple[Tensor, ...], scale: Scale) -> Tensor:
        (values,) = kept
        return (beside.t() @ values).float()  # (r, T) @ (T, n)

    def _input_gradient(self, grad: Tensor, codes: Tensor, scale: Scale, beside: Tensor | None) -> Tensor:
        width = grad.shape[1]
        if beside is None:
            values, codes = self.cast(grad, E5M2, scale.rule), codes[:width]
        else:  # [G | G B] for a single GEMM
            values = grad.new_empty(grad.shape[0], width + beside.shape[1])
            self.cast(grad, E5M2, scale.rule, out=values[:, :width])
            values[:, width:] = beside
        return (values @ self.decode(codes, scale, values.dtype)).to(grad.dtype)  # (T, m + r) @ (m + r, n)
