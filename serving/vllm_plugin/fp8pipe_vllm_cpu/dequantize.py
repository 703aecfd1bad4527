"""Exact dequantization of E4M3 weights: `weight = code * scale` in fp32, rounded once to the model's dtype.

A loaded layer may be fused from several checkpoint tensors (q/k/v, gate/up) stacked along the output axis. Each
row is multiplied by the scale of the tensor it came from. Engines with one scale per layer requantize all parts
to the largest scale, which changes codes; nothing here does.

Plain torch, no vLLM: the unit tests run anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["UNSET_SCALE", "dequantize", "expand_scale", "resolve_shard_scales"]

# vLLM fills scale parameters with this before loading; one that still holds it was not in the checkpoint.
UNSET_SCALE = torch.finfo(torch.float32).min
# fp32 temporaries are made for so many elements at a time (64 MiB), not for a whole layer.
_CHUNK_ELEMENTS = 1 << 24


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
    scale: Tensor, shape: tuple[int, int], logical_widths: Sequence[int], block: tuple[int, int] | None
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
        _require(scale.shape == expected, f"block scales are {expected}", scale)
        _check_values(scale)
        return scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    if scale.ndim == 2:
        _require(scale.shape == (rows, 1), f"row scales are ({rows}, 1)", scale)
        _check_values(scale)
        return scale
    _require(scale.numel() == len(logical_widths), f"a scale for each of {len(logical_widths)} shard(s)", scale)
    _require(sum(logical_widths) == rows, f"shard widths {list(logical_widths)} adding up to {rows}", scale)
    shard_scales = resolve_shard_scales(scale.reshape(-1))
    _check_values(shard_scales)
    return shard_scales.repeat_interleave(torch.tensor(list(logical_widths))).reshape(rows, 1)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    logical_widths: Sequence[int],
    *,
    block: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
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


def _require(condition: bool, wanted: str, scale: Tensor) -> None:
    if not condition:
        raise ValueError(f"expected {wanted}, got a scale of shape {tuple(scale.shape)}")


def _check_values(scale: Tensor) -> None:
    if bool((scale == UNSET_SCALE).any()):
        raise ValueError("the checkpoint holds no scale for a layer whose weights are FP8")
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError("a weight scale is zero, negative or not finite")
