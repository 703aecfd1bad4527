"""FP8 training on CUDA: `torch._scaled_mm` multiplies the codes, and few passes are made over what lies between.

It computes what `reference.Backend` says, with sums in another order. The one other difference: where G B is added to
dX, the sum over W's rows has been rounded to the output's dtype, for the product takes nothing to add to.

A pass over activations costs as much as a good part of a product, so casts are two, one for the largest magnitudes and
one that scales and rounds, or one of Triton (`fused.py`). While torch.compile traces, the cast is written as operators
that it can fuse with what makes their input, and the products, which add in place, are operators of their own; scales
that a product does not apply are then left to the pass that comes next.

`torch._scaled_mm` wants the first operand row-major, the second column-major (cuBLASLt's TN), and inner and outer
widths in multiples of 16: padding meets the widths, a physical transpose of one byte per weight the layout.
"""

from __future__ import annotations

import math
import sys
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8pipe.numerics import fused
from fp8pipe.numerics.grids import E4M3, E5M2, FloatGrid, Scale, amax_to_scale, power_of_two_scale
from fp8pipe.numerics.kinds import ScaleRule
from fp8pipe.numerics.reference import Backend

_ALIGN = 16


def capability(index: int) -> tuple[int, int]:
    """The compute capability of a CUDA device; to torch.compile's tracer a constant, as who compiles must declare."""
    return _capability(index)


_capability = cache(torch.cuda.get_device_capability)


def scales_rows(index: int, dtype: torch.dtype) -> bool:
    """Whether the product is to apply one scale per row itself; else its result is multiplied by them, as exactly.

    Its kernel for that is right and fast on Hopper and on Blackwell's data centre GPUs. Ada's is a slow one that stalls
    beside other streams before torch 2.12, Blackwell's GPUs for workstations (12.0) have none, Windows is built without
    any, and none gives fp32. A power of two commutes with every rounding on the way, so a product with one scale whose
    rows are multiplied afterwards has the same bits.
    """
    return capability(index)[0] in (9, 10) and dtype == torch.bfloat16 and sys.platform == "linux"


def cast_rows(x: Tensor, grid: FloatGrid) -> tuple[Tensor, Tensor]:
    """Round `x` `(rows, cols)`, bf16 or fp32, to `grid`: codes, and a power-of-two scale per row, `(rows, 1)` fp32.

    What `grids.quantize` gives, in one pass over x where Triton runs, else in two. Under its scale no value exceeds the
    grid, so none is clamped.
    """
    if not torch.compiler.is_compiling() and (found := fused.quantize_rows(x, grid)) is not None:
        return found[0], found[1].value
    amax = torch.linalg.vector_norm(x, math.inf, 1, keepdim=True, dtype=torch.float32)
    scale = power_of_two_scale(amax, grid)
    if torch.compiler.is_compiling():  # Triton divides approximately
        return _multiply(x, scale.reciprocal(), grid.dtype), scale
    # By a power of two a division is the same product, and one kernel less.
    return torch.div(x, scale, out=torch.empty(x.shape, dtype=grid.dtype, device=x.device)), scale


def cast_whole(x: Tensor, grid: FloatGrid) -> tuple[Tensor, Scale]:
    """Round `x` to `grid` on one scale of the rule `exact`: what `grids.quantize` gives, in two passes over x.

    The multiplier is rounded, so a value may exceed the grid's largest by a unit in fp32: that rounds to the largest.
    """
    amax = torch.linalg.vector_norm(x, math.inf, dtype=torch.float32)
    scale = amax_to_scale(amax, grid, ScaleRule.EXACT)
    assert scale.inverse_scale is not None
    return _multiply(x, scale.inverse_scale.view(1, 1), grid.dtype), scale  # a scalar would be rounded to bf16


def forward_products(
    x: Tensor,
    x_scale: Tensor | None,
    codes: Tensor,
    scale: Tensor,
    columns: Tensor | None,
    one: Tensor | None,
    b: Tensor | None,
    rank: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`[X W^T (+ O B^T) | O]` and O.

    Args:
        x: E4M3 codes `(tokens, in)`.
        x_scale: fp32 `(tokens, 1)`; None leaves the result in units of them.
        codes: [W; A], `(out + rank, in)` E4M3.
        scale: of the codes, a scalar.
        columns: `scale` repeated, `(out + rank,)` or more.
        one: 1, a scalar.
        b: `(out, rank)` in `dtype`.
        rank: rows of A.
        dtype: of the result.
    """
    width = codes.shape[0] - rank
    # codes (m + r, n) row-major, so its transpose is the column-major second operand, without a copy.
    wide = _scaled_mm(x, x_scale, codes.t(), scale, columns, one, dtype, fast_accumulation=True)
    # A copy: the view would keep all (T, out + r) values alive until the backward pass.
    o = wide[:, width : width + rank].clone()
    if b is not None:
        wide[:, :width].addmm_(o, b.t())  # (T, r) @ (r, m), in place: no second result is written
    return wide, o


def input_gradient(
    g: Tensor,
    g_scale: Tensor | None,
    codes: Tensor,
    scale: Tensor,
    columns: Tensor | None,
    one: Tensor | None,
    beside: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`G W (+ beside A)`, with columns to a multiple of 16.

    Args:
        g: E5M2 codes `(tokens, out)`.
        g_scale: fp32 `(tokens, 1)`; None leaves the result in units of them, and takes `beside` in these units.
        codes: [W; A], `(out + rank, in)` E4M3.
        scale: of the codes, a scalar.
        columns: `scale` repeated, `(in,)` or more.
        one: 1, a scalar.
        beside: G B times `scale`, `(tokens, rank)` in `dtype`.
        dtype: of the result.
    """
    width, into = g.shape[1], codes.shape[1]
    # The second operand must be column-major here too: one byte-wide transpose copy per layer.
    column_major = fused.transpose_bytes(_bytes(codes[:width])).view(codes.dtype).t()
    product = _scaled_mm(g, g_scale, column_major, scale, columns, one, dtype, fast_accumulation=False)
    if beside is not None:
        product[:, :into].addmm_(beside, codes[width:].to(dtype))  # (T, r) @ (r, n), thin
    return product


_forward_op = torch.library.custom_op("fp8pipe::forward_products", forward_products, mutates_args=())
_gradient_op = torch.library.custom_op("fp8pipe::input_gradient", input_gradient, mutates_args=())


@_forward_op.register_fake
def _(x, x_scale, codes, scale, columns, one, b, rank, dtype):  # type: ignore[no-untyped-def]
    wide = x.new_empty(x.shape[0], _aligned(codes.shape[0]), dtype=dtype)
    return wide, x.new_empty(x.shape[0], rank, dtype=dtype)


@_gradient_op.register_fake
def _(g, g_scale, codes, scale, columns, one, beside, dtype):  # type: ignore[no-untyped-def]
    return g.new_empty(g.shape[0], _aligned(codes.shape[1]), dtype=dtype)


class Cuda(Backend):
    """The products on FP8 tensor cores."""

    def forward(
        self, x: Tensor, codes: Tensor, scale: Scale, rank: int, b: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `Backend.forward`; Y may be columns of a wider matrix."""
        width = codes.shape[0] - rank
        if scale.rule is ScaleRule.EXACT:
            found, x_scale = cast_whole(x, E4M3)
            wide = _scaled_mm(found, x_scale.value, codes.t(), scale.value, None, None, x.dtype, fast_accumulation=True)
            return wide[:, :width], wide[:, width : width + rank].clone()
        found, rows = cast_rows(x, E4M3)
        b = None if b is None else b.to(x.dtype)
        if not torch.compiler.is_compiling():
            wide, o = forward_products(found, rows, codes, scale.value, scale.columns, scale.one, b, rank, x.dtype)
            return wide[:, :width], o
        within = rows if scales_rows(x.get_device(), x.dtype) else None
        wide, o = _forward_op(found, within, codes, scale.value, scale.columns, scale.one, b, rank, x.dtype)
        y = wide[:, :width]
        return (y, o) if within is not None else ((y * rows).to(x.dtype), (o * rows).to(x.dtype))

    def backward(
        self, grad: Tensor, o: Tensor, codes: Tensor, scale: Scale, b: Tensor | None = None, *, wants_input: bool = True
    ) -> tuple[Tensor | None, Tensor]:
        """As `Backend.backward`."""
        if scale.rule is ScaleRule.EXACT:
            return _exact_backward(grad, o, codes, scale, wants_input)
        return super().backward(grad, o, codes, scale, b, wants_input=wants_input)

    def _input_gradient(self, grad: Tensor, codes: Tensor, scale: Scale, b: Tensor | None) -> Tensor:
        g, rows = cast_rows(grad, E5M2)
        # The scale is A's, moved: a power of two, so no product and no sum is rounded otherwise.
        beside = None if b is None else grad @ _multiply(b, scale.value, grad.dtype)
        into = codes.shape[1]
        if not torch.compiler.is_compiling():
            return input_gradient(g, rows, codes, scale.value, scale.columns, scale.one, beside, grad.dtype)[:, :into]
        within = rows if scales_rows(grad.get_device(), grad.dtype) else None
        if beside is not None and within is None:
            beside = (beside / rows).to(grad.dtype)
        dx: Tensor = _gradient_op(g, within, codes, scale.value, scale.columns, scale.one, beside, grad.dtype)[:, :into]
        return dx if within is not None else (dx * rows).to(grad.dtype)


def _exact_backward(
    grad: Tensor, o: Tensor, codes: Tensor, scale: Scale, wants_input: bool
) -> tuple[Tensor | None, Tensor]:
    (g, g_scale), (a, a_scale) = cast_whole(grad, E5M2), cast_whole(o, E4M3)
    dx = None
    if wants_input:
        column_major = fused.transpose_bytes(_bytes(codes[: grad.shape[1]])).view(codes.dtype).t()
        dx = _scaled_mm(g, g_scale.value, column_major, scale.value, None, None, grad.dtype, fast_accumulation=False)
        dx = dx[:, : codes.shape[1]]
    # A bf16 GEMM of codes: r and the token count need no alignment then, at 2 T m r operations.
    product = g.to(torch.bfloat16).t() @ a.to(torch.bfloat16)
    assert g_scale.inverse_scale is not None
    assert a_scale.inverse_scale is not None
    return dx, product.float() / (g_scale.inverse_scale * a_scale.inverse_scale)


def _multiply(values: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`values * factor`, in fp32 (one of both has it), rounded once to `dtype`."""
    if torch.compiler.is_compiling():
        return (values * factor).to(dtype)
    # Rounded as it is stored: one pass, nothing wider is written.
    return torch.mul(values, factor, out=torch.empty(values.shape, dtype=dtype, device=values.device))


def _scaled_mm(
    a: Tensor,
    scale_a: Tensor | None,
    b: Tensor,
    scale_b: Tensor,
    columns: Tensor | None,
    one: Tensor | None,
    dtype: torch.dtype,
    *,
    fast_accumulation: bool,
) -> Tensor:
    """Codes `a` (rows, inner) by column-major codes `b` (inner, cols), with columns to a multiple of 16.

    `scale_a` is a scalar or `(rows, 1)`; None is 1. `columns` and `one` are made where they are needed and not given.
    """
    if b.shape[0] % _ALIGN or b.shape[1] % _ALIGN:
        b = _pad(_pad(b.t(), 0), 1).t()
    rows = None
    if scale_a is not None and scale_a.dim() == 2 and not scales_rows(a.get_device(), dtype):
        scale_a, rows = None, scale_a
    if scale_a is None:
        scale_a = torch.ones_like(scale_b) if one is None else one
    elif scale_a.dim() == 2:  # one scale per row wants one per column beside it
        cols = b.shape[1]
        if columns is None or columns.numel() < cols:
            columns = scale_b.expand(cols).contiguous()
        scale_b = columns[:cols].view(1, cols)
    product = torch._scaled_mm(
        _pad(a, 1), b, scale_a=scale_a, scale_b=scale_b, out_dtype=dtype, use_fast_accum=fast_accumulation
    )
    return product if rows is None else product.mul_(rows)


def _aligned(width: int) -> int:
    return width + -width % _ALIGN


def _pad(codes: Tensor, dim: int) -> Tensor:
    """Zero codes appended so that `dim` is a multiple of 16 (zero is code 0 in both formats)."""
    missing = -codes.shape[dim] % _ALIGN
    if not missing:
        return codes
    return F.pad(_bytes(codes), (0, missing) if dim == 1 else (0, 0, 0, missing)).view(codes.dtype)


def _bytes(codes: Tensor) -> Tensor:
    """The codes as uint8: few operators exist for float8 dtypes."""
    return codes.view(torch.uint8)
