"""Emulated FP8 activations: round to the E4M3 grid and back, as a W8A8 engine would before its GEMM.

Only with FP8PIPE_VLLM_ACTIVATIONS=quant. The scale of a row is `amax / 448`, never below `1 / (448 * 512)`: the
floor that vLLM's own dynamic kernels use, so that rows of zeros keep a finite scale. Rounding flips spread in a
deep network, so this agrees with another W8A8 engine in distribution and not token by token.

Plain torch, no vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

__all__ = ["Activations", "Granularity", "round_trip"]

_E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448
_SCALE_FLOOR = 1.0 / (_E4M3_MAX * 512.0)


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
    if kind is Granularity.STATIC:
        if static_scale is None:
            raise ValueError("static activation quantization needs the checkpoint's input_scale")
        return _on_grid(values, static_scale).to(x.dtype)
    if kind is Granularity.TENSOR:
        return _on_grid(values, _scale(values.abs().amax())).to(x.dtype)
    if kind is Granularity.TOKEN:
        return _on_grid(values, _scale(values.abs().amax(dim=-1, keepdim=True))).to(x.dtype)
    if activations.group_size < 1 or x.shape[-1] % activations.group_size:
        raise ValueError(f"{x.shape[-1]} features cannot be split in groups of {activations.group_size}")
    groups = values.reshape(*x.shape[:-1], -1, activations.group_size)
    return _on_grid(groups, _scale(groups.abs().amax(dim=-1, keepdim=True))).flatten(-2).to(x.dtype)


def _scale(amax: Tensor) -> Tensor:
    return (amax / _E4M3_MAX).clamp(min=_SCALE_FLOOR)


def _on_grid(values: Tensor, scale: Tensor) -> Tensor:
    # Clamp before the cast: whether torch's own cast saturates depends on its version and device.
    codes = (values / scale).clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.float() * scale
