"""FP8 weight codecs: pure functions between weights, E4M3 codes and the scales vLLM reads.

Direction of every scale here: `dequantized = code * scale`.

A fused layer of vLLM (q/k/v, gate/up) that finds one scale per tensor requantizes all of its parts to the
largest of them, which changes codes. A scalar repeated down the rows is read as one scale per channel and keeps
every code, so a per-tensor weight leaves here as per-channel with equal rows: the same numbers, bit for bit.

Orientation. A linear weight is `(out, in)`; GPT-2's Conv1D stores `(in, out)` and is called transposed.
Scales are `(out, 1)` in both cases, as vLLM declares them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8pipe.numerics.grids import E4M3
from fp8pipe.numerics.scales import amax_scale

__all__ = ["channel_scale", "dequantize_weight", "quantize_weight", "relative_error", "same_bits", "to_bf16"]

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def channel_scale(scale: Tensor, rows: int) -> Tensor:
    """Repeat a per-tensor scale down the rows; return a per-row scale unchanged.

    Args:
        scale: fp32, `()`, `(1,)` or `(rows, 1)`.
        rows: output features of the weight.

    Returns:
        fp32 `(rows, 1)`, contiguous; a new tensor when the input was a scalar.

    Raises:
        ValueError: any other shape or dtype.
    """
    if scale.dtype != torch.float32:
        raise ValueError(f"a weight scale is float32, got {scale.dtype}")
    if scale.shape == (rows, 1):
        return scale.contiguous()
    if scale.shape in {torch.Size([]), torch.Size([1])}:
        return scale.reshape(1, 1).repeat(rows, 1)
    raise ValueError(f"a weight scale is () or ({rows}, 1), got {tuple(scale.shape)}")


def dequantize_weight(codes: Tensor, scale: Tensor, *, transposed: bool = False) -> Tensor:
    """`code * scale` in fp32, in the orientation of `codes`.

    Args:
        codes: float8_e4m3fn, `(out, in)`, or `(in, out)` when `transposed`.
        scale: fp32, `()`, `(1,)` or `(out, 1)`.
        transposed: whether outputs lie along the second axis.

    Returns:
        fp32, shape of `codes`.
    """
    return codes.float() * (scale.reshape(1, -1) if transposed and scale.ndim == 2 else scale).float()


def quantize_weight(weight: Tensor, *, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """Round a weight to the nearest E4M3 code, each output row on its own scale (amax maps to 448).

    The scale's division runs in fp64 and is stored as fp32; codes come from an fp32 division by that stored
    scale, so that `code * scale` is what any reader gets. A row of zeros gets a tiny positive scale.

    Args:
        weight: any float dtype, `(out, in)`, or `(in, out)` when `transposed`; finite. Not modified.
        transposed: whether outputs lie along the second axis.

    Returns:
        codes: float8_e4m3fn, shape of `weight`.
        scale: fp32 `(out, 1)`, positive.
    """
    values = weight.float()
    axis = 0 if transposed else 1
    low, high = values.aminmax(dim=axis, keepdim=True)
    amax = torch.maximum(low.neg(), high)  # no fp32 copy of the weight, unlike abs()
    scale = amax_scale(amax, E4M3)
    return E4M3.cast(values / scale), scale.reshape(-1, 1).contiguous()


def to_bf16(values: Tensor) -> Tensor:
    """Round to bf16 once (nearest, ties to even); any shape, a new tensor unless already bf16."""
    return values.to(torch.bfloat16)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether dtype, shape and every bit are the same (so -0 differs from 0, and NaN equals NaN)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    bits = _BITS[a.element_size()]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def relative_error(approximation: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference over that of `reference` (0 when both are zero); norms in fp32."""
    norm = float(torch.linalg.vector_norm(reference.float()))
    error = float(torch.linalg.vector_norm(approximation.float() - reference.float()))
    return error / norm if norm > 0.0 else error
