"""The three products of a FALQON layer, on a CPU or on CUDA; the only module that knows the difference.

On a CPU operands are dequantized values and one bf16 (or fp32) GEMM with fp32 accumulation is the FP8 GEMM:
E4M3 and E5M2 codes are exact in bf16 and their products exact in fp32. On CUDA `torch._scaled_mm` runs on the
codes. It wants the first operand row-major and the second column-major (cuBLASLt's TN), inner and outer widths
in multiples of 16, and scales that dequantize; padding meets the widths, a physical transpose the layout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fp8pipe.numerics.casts import Cast, decode
from fp8pipe.numerics.kinds import ScaleRule

_ALIGN = 16  # torch._scaled_mm: K and N must be multiples of 16


def forward_product(x: Cast, codes: Tensor, scale_quant: Tensor, rule: ScaleRule, dtype: torch.dtype) -> Tensor:
    """`[Y | X A^T]`: x (tokens, in) by codes (rows, in) transposed, giving (tokens, rows) in `dtype`."""
    if not codes.is_cuda:
        weight = decode(codes, scale_quant, rule, x.values.dtype)
        return (x.values @ weight.t()).to(dtype)  # (T, n) @ (n, m + r)
    # codes (m + r, n) row-major, so its transpose is the column-major second operand, without a copy.
    return _scaled_mm(x, codes.t(), scale_quant, dtype, fast_accumulation=True)


def input_gradient(g: Cast, codes: Tensor, scale_quant: Tensor, rule: ScaleRule, dtype: torch.dtype) -> Tensor:
    """dX: g (tokens, rows) by codes (rows, in), giving (tokens, in) in `dtype`."""
    if not codes.is_cuda:
        return (g.values @ decode(codes, scale_quant, rule, g.values.dtype)).to(dtype)  # (T, m) @ (m, n)
    # The second operand must be column-major here too: one byte-wide transpose copy a layer.
    column_major = _bytes(codes).t().contiguous().view(codes.dtype).t()
    return _scaled_mm(g, column_major, scale_quant, dtype, fast_accumulation=False)


def adapter_gradient(g: Cast, o: Cast) -> Tensor:
    """dB = G^T O_A of two operands cast with one scale each: (rows, r) fp32.

    On CUDA this is a bf16 GEMM of codes: r and the token count need no alignment then, at 2 T m r operations.
    """
    if not g.values.is_cuda:
        return (g.values.t() @ o.values).float()
    product = g.values.to(torch.bfloat16).t() @ o.values.to(torch.bfloat16)
    return product.float() / (_known(g.scale_quant) * _known(o.scale_quant))


def _scaled_mm(a: Cast, b: Tensor, scale_quant: Tensor, dtype: torch.dtype, *, fast_accumulation: bool) -> Tensor:
    cols = b.shape[1]
    scale_a, scale_b = _known(a.scale_quant).reciprocal(), scale_quant.reciprocal()
    if b.shape[0] % _ALIGN or cols % _ALIGN:
        b = _pad(_pad(b.t(), 0), 1).t()
    if scale_a.dim() == 2:  # a scale a row wants its counterpart a column
        scale_b = scale_b.expand(1, b.shape[1]).contiguous()
    product = torch._scaled_mm(
        _pad(a.values, 1), b, scale_a=scale_a, scale_b=scale_b, out_dtype=dtype, use_fast_accum=fast_accumulation
    )
    return product if product.shape[1] == cols else product[:, :cols]


def _known(scale: Tensor | None) -> Tensor:
    if scale is None:
        raise RuntimeError("a cast without its scale reached CUDA: only the CPU's compiled cast drops it")
    return scale


def _pad(codes: Tensor, dim: int) -> Tensor:
    """Zero codes appended so that `dim` is a multiple of 16 (zero is code 0 in both formats)."""
    missing = -codes.shape[dim] % _ALIGN
    if not missing:
        return codes
    widths = (0, missing) if dim == 1 else (0, 0, 0, missing)
    return F.pad(_bytes(codes), widths).view(codes.dtype)


def _bytes(codes: Tensor) -> Tensor:
    """The codes as uint8: few operators exist for float8 dtypes."""
    return codes.view(torch.uint8)
