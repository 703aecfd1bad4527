"""What a linear layer of an engine multiplies by, and with which kernel: as it lies there, whatever the device.

Kernels for FP8 take codes as `(in, out)`, a view of the checkpoint's `(out, in)`, with one scale per row; some pack
codes in an order of their own, and a layer without quantization holds numbers. Which it is, is read from the layer
itself. Where a square matrix leaves the orientation open both are given, and its products decide.

Runs inside vLLM's Python: torch alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Kernel", "find_kernel", "kernel_inputs", "through_gemm"]

_CHUNK = 256  # one-hot rows per GEMM call


@dataclass(frozen=True, slots=True)
class Kernel:
    """How a layer multiplies.

    Attributes:
        name: class of the kernel, or of what stands for one.
        device: where its weight is.
        holds: FP8 `codes` that can be read, codes `packed` so that they cannot, or `numbers`.
        codes: of `codes`, each orientation that its shape allows: fp8 `(out, in)` on the CPU.
        scale: of `codes`, fp32 `(out, 1)`, dequantized = code * scale.
        dtype: of inputs and outputs.
        inner: the kernel itself, where the layer has one.
    """

    name: str
    device: str
    holds: Literal["codes", "packed", "numbers"]
    codes: tuple[Tensor, ...]
    scale: Tensor | None
    dtype: torch.dtype
    inner: Any


def find_kernel(layer: Any, rows: int, columns: int) -> Kernel:
    """The kernel of one of vLLM's linear layers with this number of outputs and inputs."""
    inner = _inner(layer)
    scheme = getattr(layer, "scheme", None)
    name = type(next(part for part in (inner, scheme, layer.quant_method) if part is not None)).__name__
    weight, scale = layer.weight.detach(), getattr(layer, "weight_scale", None)
    codes: tuple[Tensor, ...] = ()
    if weight.dtype is torch.float8_e4m3fn and isinstance(scale, Tensor) and scale.numel() in (1, rows):
        views = ((weight, (rows, columns)), (weight.t() if weight.ndim == 2 else weight, (rows, columns)))
        codes = tuple(view.cpu().contiguous() for view, shape in views if tuple(view.shape) == shape)
    one_byte = not weight.dtype.is_floating_point or weight.dtype.itemsize == 1
    packed = inner is not None and (one_byte or not weight.numel())
    return Kernel(
        name, str(weight.device), "codes" if codes else "packed" if packed else "numbers", codes,
        scale.detach().cpu().float().reshape(-1, 1).expand(rows, 1) if codes and scale is not None else None,
        layer.params_dtype, inner,
    )  # fmt: skip


def _inner(layer: Any) -> Any:
    """The object that holds a layer's kernel: an attribute of its scheme, or of its method."""
    for owner in (getattr(layer, "scheme", None), layer.quant_method):
        for value in vars(owner).values() if owner is not None else ():
            if callable(getattr(value, "apply_weights", None)):
                return value
    return None


@contextmanager
def kernel_inputs(kernel: Kernel) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Collects what the kernel multiplies while this lasts: codes of inputs and their scales, as it gets them.

    Nothing is collected of a kernel that does not multiply through vLLM's common interface.
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
    """Some columns of the weight, as the layer's own multiplication returns them: fp32 `(rows, len(asked))`."""
    out = torch.empty(rows, len(asked))
    for start in range(0, len(asked), _CHUNK):
        chosen = asked[start : start + _CHUNK]
        one_hot = torch.zeros(len(chosen), columns, dtype=layer.params_dtype)
        one_hot[torch.arange(len(chosen)), chosen] = 1.0
        product = layer.quant_method.apply(layer, one_hot.to(layer.weight.device), None)
        out[:, start : start + len(chosen)] = product.cpu().float().t()
    return out
