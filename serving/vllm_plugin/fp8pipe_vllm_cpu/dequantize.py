"""The arithmetic: exact dequantization of E4M3 weights, and emulated FP8 activations.

A weight is `code * scale` in fp32, rounded once to the model's dtype. A loaded layer may be fused from several
checkpoint tensors (q/k/v, gate/up) stacked along the output axis. Each row is multiplied by the scale of the tensor
it came from. Engines with one scale per layer requantize all parts to the largest scale, which changes codes;
nothing here does.

Activations (only with FP8PIPE_VLLM_ACTIVATIONS=quant) are rounded to the E4M3 grid and back, as a W8A8 engine would
before its GEMM. The scale of a row is `amax / 448`, never below `1 / (448 * 512)`: the floor that vLLM's own dynamic
kernels use, so that rows of zeros keep a finite scale. Rounding flips spread in a deep network, so this agrees with
another W8A8 engine in distribution and not token by token.

Plain torch, no vLLM: the unit tests run anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

# vLLM fills scale parameters with this before loading; one that still holds it was not in the checkpoint.
UNSET_SCALE = torch.finfo(torch.float32).min
# fp32 temporaries are made for so many elements at a time (64 MiB), not for a whole layer.
_CHUNK_ELEMENTS = 1 << 24
_E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448
_SCALE_FLOOR = 1.0 / (_E4M3_MAX * 512.0)


def resolve_shard_scales(scales: Tensor) -> Tensor:
    """Fill the scales, fp32 `(shards,)`, of shards that the checkpoint had fused already; a new tensor where needed.

    A checkpoint that stores q/k/v as one tensor has one scale for it, and vLLM loads that into the first shard's
    place only; the others hold `UNSET_SCALE`.

    Raises:
        ValueError: no scale was loaded, or some but not all of several (so it is unclear which shard lacks one).
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
    """One scale per row, or one per element for blocks, broadcastable to `shape`.

    Args:
        scale: fp32; `(shards,)` or `()` per tensor, `(out, 1)` per channel, `(ceil(out/bn), ceil(in/bk))` blocks.
        shape: the weight's `(out, in)`.
        logical_widths: output features of each fused shard; they add up to `out`.
        block: `(bn, bk)`, or None.

    Returns:
        fp32 `(out, 1)`, or `(out, in)` for blocks.

    Raises:
        ValueError: the shapes do not belong together, or a scale is unset, zero, negative or not finite.
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
    """`code * scale` of one loaded layer.

    Args:
        codes: float8_e4m3fn `(out, in)`.
        scale: fp32, any of the shapes of `expand_scale`; dequantized = code * scale.
        logical_widths: output features of each fused shard.
        block: `(bn, bk)` of block scales, or None.
        dtype: of the result; the fp32 product is rounded to it once, to nearest.

    Returns:
        A new contiguous tensor `(out, in)` of `dtype`.

    Raises:
        ValueError: see `expand_scale`; or codes that are not 2-D E4M3.
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


def _check(scale: Tensor, fits: bool, wanted: str) -> None:
    if not fits:
        raise ValueError(f"expected {wanted}, got a scale of shape {tuple(scale.shape)}")
    if bool((scale == UNSET_SCALE).any()):
        raise ValueError("the checkpoint holds no scale for a layer whose weights are FP8")
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError("a weight scale is zero, negative or not finite")


class Granularity(Enum):
    """What shares one activation scale."""

    NONE = "none"  # activations are not quantized (W8A16)
    STATIC = "static"  # one scale from the checkpoint
    TENSOR = "tensor"  # one scale per call
    TOKEN = "token"  # one scale per row
    GROUP = "group"  # one scale per group of columns of each row


@dataclass(frozen=True, slots=True)
class Activations:
    """How a checkpoint quantizes activations."""

    granularity: Granularity  # what shares a scale
    group_size: int = 0  # columns of a group, for GROUP


def round_trip(x: Tensor, activations: Activations, static_scale: Tensor | None = None) -> Tensor:
    """Quantize `x` to E4M3 and back.

    Args:
        x: any float dtype, `(..., features)`; not modified.
        activations: the checkpoint's scheme.
        static_scale: fp32 `()`, dequantized = code * scale; for STATIC only.

    Returns:
        Shape and dtype of `x`.

    Raises:
        ValueError: STATIC without a scale, or features that groups do not divide.
    """
    kind = activations.granularity
    if kind is Granularity.NONE:
        return x
    values = x.float()
    if kind is Granularity.GROUP:
        if activations.group_size < 1 or x.shape[-1] % activations.group_size:
            raise ValueError(f"{x.shape[-1]} features cannot be split in groups of {activations.group_size}")
        values = values.reshape(*x.shape[:-1], -1, activations.group_size)
    if kind is not Granularity.STATIC:
        amax = values.abs().amax() if kind is Granularity.TENSOR else values.abs().amax(dim=-1, keepdim=True)
        scale = (amax / _E4M3_MAX).clamp(min=_SCALE_FLOOR)
    elif static_scale is not None:
        scale = static_scale
    else:
        raise ValueError("static activation quantization needs the checkpoint's input_scale")
    # Clamp before the cast: whether torch's own cast saturates depends on its version and device.
    codes = (values / scale).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    return (codes.float() * scale).reshape(x.shape).to(x.dtype)
