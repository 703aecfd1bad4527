"""Determines the weight of a linear layer in an engine and the kernel that multiplies by it, on any device.

Most FP8 kernels use codes as `(in, out)`, a view of the checkpoint's `(out, in)`, with one scale per row; those for one
scale per block use `(out, in)`. Some kernels pack the codes in a layout of their own, and unquantized layers store
plain weights. Which case applies is determined from the layer's attributes. The orientation of a square matrix is
ambiguous, so both candidates are returned; the caller selects the one that agrees with the layer's outputs.

Runs inside vLLM's Python: only torch is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Kernel", "find_kernel", "input_divisor", "kernel_inputs", "through_gemm"]

_CHUNK = 256  # one-hot rows per GEMM call


@dataclass(frozen=True, slots=True)
class Kernel:
    """The kernel of a layer, and the weight that it stores.

    Attributes:
        name: class name of the kernel, or of the scheme or method if there is no kernel object.
        device: device of the weight.
        holds: `codes`: readable FP8 codes; `packed`: FP8 codes in an unreadable layout; `numbers`: plain weights.
        codes: for `codes`, one tensor per orientation that the shape allows: fp8 `(out, in)` on the CPU.
        scale: for `codes`, fp32 `(out, 1)`, or `(out, in)` if scales are per block; dequantized = code * scale.
        dtype: dtype of inputs and outputs.
        inner: the kernel object, if the layer has one.
        divisor: for inputs in NVFP4, the reciprocal of their global scale; else None.
    """

    name: str
    device: str
    holds: Literal["codes", "packed", "numbers"]
    codes: tuple[Tensor, ...]
    scale: Tensor | None
    dtype: torch.dtype
    inner: Any
    divisor: float | None = None


def find_kernel(layer: Any, rows: int, columns: int) -> Kernel:
    """Find the kernel of a vLLM linear layer with `rows` output features and `columns` input features."""
    inner = _inner(layer)
    scheme = getattr(layer, "scheme", None)
    name = type(next(part for part in (inner, scheme, layer.quant_method) if part is not None)).__name__
    weight, scale = layer.weight.detach(), _spread_scale(layer, rows, columns)
    codes: tuple[Tensor, ...] = ()
    if weight.dtype is torch.float8_e4m3fn and scale is not None:
        views = ((weight, (rows, columns)), (weight.t() if weight.ndim == 2 else weight, (rows, columns)))
        codes = tuple(view.cpu().contiguous() for view, shape in views if tuple(view.shape) == shape)
    one_byte = not weight.dtype.is_floating_point or weight.dtype.itemsize == 1
    packed = inner is not None and (one_byte or not weight.numel())
    return Kernel(
        name, str(weight.device), "codes" if codes else "packed" if packed else "numbers", codes,
        scale if codes else None, layer.params_dtype, inner, input_divisor(layer),
    )  # fmt: skip


def input_divisor(layer: Any) -> float | None:
    """The reciprocal of the global scale of a layer's inputs in NVFP4, as its kernel uses it; None without one."""
    held = getattr(layer, "input_global_scale_inv", None)
    return float(held) if isinstance(held, Tensor) and held.numel() == 1 else None


def _spread_scale(layer: Any, rows: int, columns: int) -> Tensor | None:
    """The weight scale of a layer, as `Kernel.scale`; None if there is none, or one of an unknown layout."""
    scale, block = getattr(layer, "weight_scale", None), getattr(layer, "weight_block_size", None)
    if not isinstance(scale, Tensor):
        return None
    held = scale.detach().cpu().float()
    if block is None:
        return held.reshape(-1, 1).expand(rows, 1) if held.numel() in (1, rows) else None
    if tuple(held.shape) != (-(-rows // block[0]), -(-columns // block[1])):
        return None
    return held.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]


def _inner(layer: Any) -> Any:
    """The kernel object of a layer: an attribute of its scheme or of its quantization method."""
    for owner in (getattr(layer, "scheme", None), layer.quant_method):
        for value in vars(owner).values() if owner is not None else ():
            if callable(getattr(value, "apply_weights", None)):
                return value
    return None


@contextmanager
def kernel_inputs(kernel: Kernel) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Within the `with` block, record the quantized inputs of the kernel: (codes, scales) per call, on the CPU.

    The list stays empty for kernels that do not use vLLM's common interface `apply_scaled_mm`.
    """
    seen: list[tuple[Tensor, Tensor]] = []
    true = getattr(kernel.inner, "apply_scaled_mm", None)
    if true is None:
        yield seen
        return

    def multiply(**given: Any) -> Tensor:
        seen.append((given["A"].detach().cpu(), given["As"].detach().cpu()))
        product: Tensor = true(**given)
        return product

    kernel.inner.apply_scaled_mm = multiply
    try:
        yield seen
    finally:
        del kernel.inner.apply_scaled_mm


def through_gemm(layer: Any, asked: Tensor, rows: int, columns: int) -> Tensor:
    """Read columns of a layer's weight by running the layer on one-hot inputs.

    The number in place of the one is one that a layer with inputs in NVFP4 does not round: the code 6, with the block
    scale 1. Its products with weights in NVFP4 are exact in bf16.

    Args:
        layer: the vLLM layer.
        asked: int64, indices of the columns.
        rows: output features of the layer.
        columns: input features of the layer.

    Returns:
        fp32 `(rows, len(asked))` on the CPU.
    """
    divisor = input_divisor(layer)
    hot = 1.0 if divisor is None else 6.0 / divisor
    out = torch.empty(rows, len(asked))
    for start in range(0, len(asked), _CHUNK):
        chosen = asked[start : start + _CHUNK]
        one_hot = torch.zeros(len(chosen), columns, dtype=layer.params_dtype)
        one_hot[torch.arange(len(chosen)), chosen] = hot
        product = layer.quant_method.apply(layer, one_hot.to(layer.weight.device), None)
        out[:, start : start + len(chosen)] = product.cpu().float().t() / hot
    return out
