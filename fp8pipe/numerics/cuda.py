"""FP8 training on CUDA: FP8 codes are multiplied by `torch._scaled_mm`, with few elementwise passes in between.

The names W, A, B, G, O and X are those of `reference.Backend`. The results are the same except for two differences: the
order of summation, and, if G B contributes to dX, a rounding of G W to the output's dtype before G B A is added,
because `torch._scaled_mm` cannot accumulate into an existing result.

A pass over activations takes a considerable part of the time of a GEMM. So a cast takes only two passes, one for the
largest magnitudes and one that scales and rounds, or a single Triton kernel (`fused.py`). Under torch.compile, the cast
consists of operators that are fused with the operation that produces their input. The GEMMs, which accumulate in place,
are custom operators there. Row scales that `torch._scaled_mm` does not apply are multiplied outside the custom
operator, where they are fused with the next operation.

`torch._scaled_mm` requires the first operand in row-major and the second in column-major order (cuBLASLt's TN layout),
and dimensions that are multiples of 16. Operands are padded to such multiples. For the layout, W is transposed, which
takes a copy of one byte per weight.
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
    """The compute capability of the CUDA device with this index.

    Before code that calls this is compiled, pass this function to `torch.compiler.assume_constant_result`.
    """
    return _capability(index)


_capability = cache(torch.cuda.get_device_capability)


def scales_rows(index: int, dtype: torch.dtype) -> bool:
    """Whether `torch._scaled_mm` is used to apply per-row scales; if not, its result is multiplied by them afterwards.

    Its kernels for row scales are correct and fast on Hopper and data-center Blackwell. On Ada, the kernel is slow and,
    before torch 2.12, stalls when other streams are active. Workstation Blackwell (12.0) and Windows builds have no
    such kernel, and no kernel outputs fp32. Both ways give the same bits, because the scales are powers of two, and
    multiplying by a power of two commutes with every rounding involved.

    Args:
        index: index of the CUDA device.
        dtype: dtype of the product.
    """
    return capability(index)[0] in (9, 10) and dtype == torch.bfloat16 and sys.platform == "linux"


def cast_rows(x: Tensor, grid: FloatGrid) -> tuple[Tensor, Tensor]:
    """Round `x` `(rows, cols)`, bf16 or fp32, to `grid`, with one power-of-two scale per row.

    The result equals that of `grids.quantize`. It takes one pass over `x` if Triton can be used, otherwise two. With
    these scales no value exceeds the grid's range, so that no clamping is needed.

    Returns:
        The codes `(rows, cols)`, and the scales `(rows, 1)` in fp32.
    """
    if not torch.compiler.is_compiling() and (found := fused.quantize_rows(x, grid)) is not None:
        return found[0], found[1].value
    amax = torch.linalg.vector_norm(x, math.inf, 1, keepdim=True, dtype=torch.float32)
    scale = power_of_two_scale(amax, grid)
    if torch.compiler.is_compiling():  # division is approximate in Triton
        return _multiply(x, scale.reciprocal(), grid.dtype), scale
    # Dividing by a power of two equals multiplying by its reciprocal, and saves a kernel.
    return torch.div(x, scale, out=torch.empty(x.shape, dtype=grid.dtype, device=x.device)), scale


def cast_whole(x: Tensor, grid: FloatGrid) -> tuple[Tensor, Scale]:
    """Round `x` `(rows, cols)` to `grid` with one scale of the rule `exact`, in two passes over `x`.

    The result equals that of `grids.quantize`: because the multiplier is rounded, a scaled value may exceed the grid's
    maximum by one fp32 ulp, but is then rounded to the maximum.
    """
    amax = torch.linalg.vector_norm(x, math.inf, dtype=torch.float32)
    scale = amax_to_scale(amax, grid, ScaleRule.EXACT)
    assert scale.inverse_scale is not None
    return _multiply(x, scale.inverse_scale.view(1, 1), grid.dtype), scale  # a 0-d factor would be rounded to bf16


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
    """The products of the forward pass: `[X W^T | O]` with `O = X A^T`, and O; if `b` is given, `[X W^T + O B^T | O]`.

    Args:
        x: E4M3 codes of X, `(tokens, in)`.
        x_scale: row scales of X, fp32 `(tokens, 1)`; None to leave them out of the result.
        codes: E4M3 codes of [W; A], `(out + rank, in)`.
        scale: scale of these codes, a scalar.
        columns: `scale` repeated to at least `(out + rank,)`, see `Scale.columns`; None to create it if needed.
        one: a scalar tensor with the value 1, see `Scale.one`; None to create it if needed.
        b: B, `(out, rank)` in `dtype`.
        rank: number of rows of A.
        dtype: dtype of the results.

    Returns:
        The wide product, with columns padded to a multiple of 16, and a copy of O, `(tokens, rank)`.
    """
    width = codes.shape[0] - rank
    # codes is (m + r, n) row-major, so its transpose is a column-major second operand without a copy.
    wide = _scaled_mm(x, x_scale, codes.t(), scale, columns, one, dtype, fast_accumulation=True)
    # O is copied, because a view would keep all (T, out + r) values alive until the backward pass.
    o = wide[:, width : width + rank].clone()
    if b is not None:
        wide[:, :width].addmm_(o, b.t())  # (T, r) @ (r, m), in place to save memory for a second output
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
    """The gradient of the input, `G W`, or `G W + G B A` if `beside` is given; columns padded to a multiple of 16.

    Args:
        g: E5M2 codes of G, `(tokens, out)`.
        g_scale: row scales of G, fp32 `(tokens, 1)`; None to leave them out of the result, and then `beside` must have
            been divided by them.
        codes: E4M3 codes of [W; A], `(out + rank, in)`.
        scale: scale of these codes, a scalar.
        columns: `scale` repeated to at least `(in,)`, see `Scale.columns`; None to create it if needed.
        one: a scalar tensor with the value 1, see `Scale.one`; None to create it if needed.
        beside: G B times `scale`, `(tokens, rank)` in `dtype`.
        dtype: dtype of the result.
    """
    width, into = g.shape[1], codes.shape[1]
    # The second operand must be column-major here too, which takes a transposed copy of the codes of W.
    column_major = fused.transpose_bytes(_bytes(codes[:width])).view(codes.dtype).t()
    product = _scaled_mm(g, g_scale, column_major, scale, columns, one, dtype, fast_accumulation=False)
    if beside is not None:
        product[:, :into].addmm_(beside, codes[width:].to(dtype))  # (T, r) @ (r, n), a small GEMM
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
    """The backend for CUDA GPUs with FP8 tensor cores."""

    def forward(
        self, x: Tensor, codes: Tensor, scale: Scale, rank: int, b: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Backend.forward`; Y may be a view of some columns of a wider matrix."""
        if scale.rule is ScaleRule.EXACT:
            width = codes.shape[0] - rank
            found, x_scale = cast_whole(x, E4M3)
            wide = _scaled_mm(found, x_scale.value, codes.t(), scale.value, None, None, x.dtype, fast_accumulation=True)
            return wide[:, :width], wide[:, width : width + rank].clone()
        y, o, _ = self.forward_keeping(x, codes, scale, rank, b)
        return y, o

    def forward_keeping(
        self, x: Tensor, codes: Tensor, scale: Scale, rank: int, b: Tensor | None = None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """See `Backend.forward_keeping`; keeps the codes of X and their row scales."""
        width = codes.shape[0] - rank
        found, rows = cast_rows(x, E4M3)
        b = None if b is None else b.to(x.dtype)
        if not torch.compiler.is_compiling():
            wide, o = forward_products(found, rows, codes, scale.value, scale.columns, scale.one, b, rank, x.dtype)
            return wide[:, :width], o, (found, rows)
        within = rows if scales_rows(x.get_device(), x.dtype) else None
        wide, o = _forward_op(found, within, codes, scale.value, scale.columns, scale.one, b, rank, x.dtype)
        y = wide[:, :width]
        if within is None:
            y, o = (y * rows).to(x.dtype), (o * rows).to(x.dtype)
        return y, o, (found, rows)

    def backward(
        self, grad: Tensor, o: Tensor, codes: Tensor, scale: Scale, b: Tensor | None = None, *, wants_input: bool = True
    ) -> tuple[Tensor | None, Tensor]:
        """See `Backend.backward`."""
        if scale.rule is ScaleRule.EXACT:
            return _exact_backward(grad, o, codes, scale, wants_input)
        return super().backward(grad, o, codes, scale, b, wants_input=wants_input)

    def _beside(self, grad: Tensor, scale: Scale, b: Tensor) -> Tensor:
        # The scale of A is applied to B instead; it is a power of two, so the rounding is the same.
        return grad @ _multiply(b, scale.value, grad.dtype)

    def _adapter_gradient(self, beside: Tensor, kept: tuple[Tensor, ...], scale: Scale) -> Tensor:
        found, rows = kept
        # The row scales are applied to the thin factor; all scales are powers of two, so the rounding is the same.
        return (_multiply(beside, rows, beside.dtype).t() @ found.to(beside.dtype)).float() / scale.value

    def _input_gradient(self, grad: Tensor, codes: Tensor, scale: Scale, beside: Tensor | None) -> Tensor:
        g, rows = cast_rows(grad, E5M2)
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
    # A bf16 GEMM of the codes (2 T m r operations), which needs no alignment of r and the token count.
    product = g.to(torch.bfloat16).t() @ a.to(torch.bfloat16)
    assert g_scale.inverse_scale is not None
    assert a_scale.inverse_scale is not None
    return dx, product.float() / (g_scale.inverse_scale * a_scale.inverse_scale)


def _multiply(values: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`values * factor`, computed in fp32 (at least one of them must be fp32) and rounded once to `dtype`."""
    if torch.compiler.is_compiling():
        return (values * factor).to(dtype)
    # With `out`, the product is rounded when it is stored, in one pass and without an intermediate fp32 tensor.
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
    """Multiply FP8 codes and their scales; the columns of the result are padded to a multiple of 16.

    Args:
        a: codes `(rows, inner)`, row-major.
        scale_a: scale of `a`, fp32, a scalar or `(rows, 1)`; None means 1.
        b: codes `(inner, cols)`, column-major.
        scale_b: scale of `b`, an fp32 scalar.
        columns: `scale_b` repeated to at least `(cols,)`; None to create it if needed.
        one: a scalar tensor with the value 1; None to create it if needed.
        dtype: dtype of the result.
        fast_accumulation: accumulate with reduced precision within the tensor cores (`use_fast_accum`).
    """
    if b.shape[0] % _ALIGN or b.shape[1] % _ALIGN:
        b = _pad(_pad(b.t(), 0), 1).t()
    rows = None
    if scale_a is not None and scale_a.dim() == 2 and not scales_rows(a.get_device(), dtype):
        scale_a, rows = None, scale_a
    if scale_a is None:
        scale_a = torch.ones_like(scale_b) if one is None else one
    elif scale_a.dim() == 2:  # row-wise scales of a require column-wise scales of b
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
    """Append zero codes so that `dim` is a multiple of 16 (zero is code 0 in both formats)."""
    missing = -codes.shape[dim] % _ALIGN
    if not missing:
        return codes
    return F.pad(_bytes(codes), (0, missing) if dim == 1 else (0, 0, 0, missing)).view(codes.dtype)


def _bytes(codes: Tensor) -> Tensor:
    """The codes viewed as uint8, because few operators support float8 dtypes."""
    return codes.view(torch.uint8)
