"""The plugin's arithmetic: exact dequantization of E4M3 and NVFP4 weights, and emulated quantization of inputs.

A weight is `code * scale` in fp32, rounded once to the model's dtype. A loaded layer may be fused from several
checkpoint tensors (q/k/v, gate/up) stacked along the output axis; each row is multiplied by the scale of the tensor
that it came from. Engines with one scale per layer requantize all parts to the largest scale, which changes codes;
this module never requantizes.

With FP8PIPE_VLLM_ACTIVATIONS=quant, activations are quantized to E4M3 and dequantized, as a W8A8 engine does before its
GEMM. A dynamic scale is `amax / 448`, but at least `1 / (448 * 512)`, the minimum in vLLM's own dynamic quantization
kernels, which avoids division by zero for all-zero rows. Small rounding differences grow through a deep network, so
outputs agree with another W8A8 engine statistically and not token by token. Inputs in NVFP4 are emulated likewise.

This module uses plain torch and does not import vLLM, so that its unit tests run anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

# vLLM fills scale parameters with this before loading; a scale that still has this value was not in the checkpoint.
UNSET_SCALE = torch.finfo(torch.float32).min
# Dequantization processes this many elements at a time (64 MiB in fp32), to limit the memory for temporaries.
_CHUNK_ELEMENTS = 1 << 24
_E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float32)
NVFP4_BLOCK = 16  # inputs that share a scale
_SCALE_FLOOR = 1.0 / (_E4M3_MAX * 512.0)


def resolve_shard_scales(scales: Tensor) -> Tensor:
    """Fill in the missing scales, fp32 `(shards,)`, of a layer whose shards are already fused in the checkpoint.

    A checkpoint that stores q/k/v as one tensor has one scale for it. vLLM loads that scale for the first shard only,
    and the others keep `UNSET_SCALE`. Returns `scales` itself if none is unset.

    Raises:
        ValueError: the first scale is unset, or some but not all of the others are.
    """
    unset = scales == UNSET_SCALE
    if not bool(unset.any()):
        return scales
    if bool(unset[0]) or not bool(unset[1:].all()):
        missing = unset.nonzero().flatten().tolist()
        raise ValueError(f"the checkpoint holds no scale for part(s) {missing} of {scales.numel()} of a layer")
    return scales[:1].expand_as(scales).clone()


def expand_scale(
    scale: Tensor, shape: tuple[int, int], logical_widths: Sequence[int], block: Sequence[int] | None
) -> Tensor:
    """Expand scales to one per row (per element for block scales), broadcastable to `shape`.

    Args:
        scale: fp32; `(shards,)` or `()` per tensor, `(out, 1)` per channel, `(ceil(out/bn), ceil(in/bk))` per block.
        shape: `(out, in)` of the weight.
        logical_widths: output features of each fused shard; their sum is `out`.
        block: `(bn, bk)` for block scales, or None.

    Returns:
        fp32 `(out, 1)`, or `(out, in)` for block scales.

    Raises:
        ValueError: the shapes are inconsistent, or a scale is unset, zero, negative or not finite.
    """
    rows, columns = shape
    if block is not None:
        expected = (-(-rows // block[0]), -(-columns // block[1]))
        _check(scale, scale.shape == expected, f"block scales are {expected}")
        return scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    if scale.ndim == 2:
        _check(scale, scale.shape == (rows, 1), f"row scales are ({rows}, 1)")
        return scale
    shard_scales = resolve_shard_scales(scale.reshape(-1))
    _check(shard_scales, scale.numel() == len(logical_widths), f"a scale for each of {len(logical_widths)} shard(s)")
    _check(shard_scales, sum(logical_widths) == rows, f"shard widths {list(logical_widths)} adding up to {rows}")
    return shard_scales.repeat_interleave(torch.tensor(list(logical_widths))).reshape(rows, 1)


def dequantize(
    codes: Tensor, scale: Tensor, logical_widths: Sequence[int], *, block: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """Dequantize the weight of one loaded layer: `code * scale`.

    Args:
        codes: float8_e4m3fn `(out, in)`.
        scale: fp32, any of the shapes of `expand_scale`; dequantized = code * scale.
        logical_widths: output features of each fused shard.
        block: `(bn, bk)` for block scales, or None.
        dtype: dtype of the result; the fp32 product is rounded to it once, to nearest.

    Returns:
        A new contiguous tensor `(out, in)` of `dtype`.

    Raises:
        ValueError: see `expand_scale`; or the codes are not 2-D E4M3.
    """
    if codes.dtype != torch.float8_e4m3fn or codes.ndim != 2:
        raise ValueError(f"codes are 2-D float8_e4m3fn, got {tuple(codes.shape)} {codes.dtype}")
    rows, columns = codes.shape
    row_scale = expand_scale(scale.detach().float(), (rows, columns), logical_widths, block)
    weight = torch.empty(rows, columns, dtype=dtype)
    step = max(1, _CHUNK_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        weight[part] = (codes[part].float() * row_scale[part]).to(dtype)
    return weight


def dequantize_nvfp4(
    packed: Tensor, scale: Tensor, wholes: Tensor, dtype: torch.dtype = torch.float32, *, divides: bool = True
) -> Tensor:
    """Dequantize the weight of one loaded layer in NVFP4: `code * scale / divisor`, or `code * scale * factor`.

    As in vLLM's own kernels, the largest divisor or factor counts for all fused shards; a checkpoint in which they
    differ holds other weights than any engine serves.

    Args:
        packed: E2M1 codes, uint8 `(out, in / 2)`; the first of a pair is in the low half of its byte.
        scale: float8_e4m3fn `(out, in / 16)`.
        wholes: divisors or factors, fp32 `(shards,)`.
        dtype: dtype of the result; the fp32 value is rounded to it once, to nearest.
        divides: whether `wholes` are divisors.

    Returns:
        A new contiguous tensor `(out, in)` of `dtype`.

    Raises:
        ValueError: a scale is unset, zero, negative or not finite, or shapes do not fit.
    """
    rows, columns = packed.shape[0], 2 * packed.shape[1]
    blocks, grid = scale.detach().float(), (rows, columns // NVFP4_BLOCK)
    if blocks.shape != grid:
        raise ValueError(f"expected block scales {grid}, got {tuple(blocks.shape)}")
    if not bool((blocks > 0).all()):
        raise ValueError("a block scale is missing, zero, negative or NaN")
    whole = largest_of_parts(wholes)
    weight = torch.empty(rows, columns, dtype=dtype)
    step = max(1, _CHUNK_ELEMENTS // max(1, columns))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        pairs = packed[part]
        codes = torch.stack((pairs & 0x0F, pairs >> 4), dim=-1).view(pairs.shape[0], -1, NVFP4_BLOCK)
        magnitude = _E2M1[(codes & 0x07).long()]
        values = torch.where(codes >= 8, -magnitude, magnitude) * blocks[part].unsqueeze(-1)
        weight[part] = (values.flatten(1) / whole if divides else values.flatten(1) * whole).to(dtype)
    return weight


def largest_of_parts(wholes: Tensor) -> Tensor:
    """The largest of the global scales of a layer's shards as they are stored, fp32 `()`; `wholes` is fp32 `(shards,)`.

    Raises:
        ValueError: one is unset, zero, negative or not finite.
    """
    shards = resolve_shard_scales(wholes.detach().float().reshape(-1))
    if not bool((torch.isfinite(shards) & (shards > 0)).all()):
        raise ValueError("a global scale is missing, zero, negative or not finite")
    return shards.max()


def round_trip_nvfp4(x: Tensor, divisor: Tensor) -> Tensor:
    """Quantize `x` to NVFP4 and dequantize it: `code * scale / divisor`, with an E4M3 scale per block of 16 features.

    The operations and their order are those of vLLM's own emulation and its GPU kernels, which multiply by reciprocals:
    a scale is `divisor * (amax * (1 / 6))` rounded to E4M3, and codes are `x / (scale / divisor)` rounded to nearest,
    ties to even. With a power of two as the divisor the result is exact in bf16.

    Args:
        x: any float dtype, `(..., features)`; not modified.
        divisor: fp32 `()`, the reciprocal of the global scale.

    Returns:
        A tensor with the shape and dtype of `x`.

    Raises:
        ValueError: the number of features is no multiple of 16.
    """
    if x.shape[-1] % NVFP4_BLOCK:
        raise ValueError(f"{x.shape[-1]} features cannot be split into blocks of {NVFP4_BLOCK}")
    values = x.float().reshape(*x.shape[:-1], -1, NVFP4_BLOCK)
    wanted = divisor * (values.abs().amax(dim=-1, keepdim=True) * (1.0 / 6.0))
    scale = wanted.clamp(max=_E4M3_MAX).to(torch.float8_e4m3fn).float()
    unit = scale * (1.0 / divisor)
    # A scale of zero belongs to a block that is too small for any other: its codes are zero.
    quotients = (values * torch.where(unit > 0, 1.0 / unit, 0.0)).clamp(-6.0, 6.0)
    size = quotients.abs()
    step = torch.where(size < 2.0, 0.5, torch.where(size < 4.0, 1.0, 2.0))
    return (torch.round(quotients / step) * step * unit).reshape(x.shape).to(x.dtype)


def _check(scale: Tensor, fits: bool, wanted: str) -> None:
    if not fits:
        raise ValueError(f"expected {wanted}, got a scale of shape {tuple(scale.shape)}")
    if bool((scale == UNSET_SCALE).any()):
        raise ValueError("the checkpoint holds no scale for a layer whose weights are quantized")
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError("a weight scale is zero, negative or not finite")


class Granularity(Enum):
    """The granularity of activation scales."""

    NONE = "none"  # activations are not quantized (W8A16)
    STATIC = "static"  # one static scale, stored in the checkpoint
    TENSOR = "tensor"  # one dynamic scale per tensor
    TOKEN = "token"  # one dynamic scale per token (row)
    GROUP = "group"  # one dynamic scale per group of columns in each row


@dataclass(frozen=True, slots=True)
class Activations:
    """How a checkpoint quantizes activations."""

    granularity: Granularity  # which elements share a scale
    group_size: int = 0  # columns per group, for GROUP


def round_trip(x: Tensor, activations: Activations, static_scale: Tensor | None = None) -> Tensor:
    """Quantize `x` to E4M3 and dequantize it.

    Args:
        x: any float dtype, `(..., features)`; not modified.
        activations: the activation scheme of the checkpoint.
        static_scale: fp32 `()`, dequantized = code * scale; for STATIC only.

    Returns:
        A tensor with the shape and dtype of `x`.

    Raises:
        ValueError: STATIC without a scale, or the number of features is not divisible by the group size.
    """
    kind = activations.granularity
    if kind is Granularity.NONE:
        return x
    values = x.float()
    if kind is Granularity.GROUP:
        if activations.group_size < 1 or x.shape[-1] % activations.group_size:
            raise ValueError(f"{x.shape[-1]} features cannot be split into groups of {activations.group_size}")
        values = values.reshape(*x.shape[:-1], -1, activations.group_size)
    if kind is not Granularity.STATIC:
        amax = values.abs().amax() if kind is Granularity.TENSOR else values.abs().amax(dim=-1, keepdim=True)
        scale = (amax / _E4M3_MAX).clamp(min=_SCALE_FLOOR)
    elif static_scale is not None:
        scale = static_scale
    else:
        raise ValueError("static activation quantization needs the checkpoint's input_scale")
    # Clamp before the cast: whether torch's cast saturates depends on its version and the device.
    codes = (values / scale).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    return (codes.float() * scale).reshape(x.shape).to(x.dtype)
