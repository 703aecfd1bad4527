"""Speeds up matrix multiplication and convolution of bf16 tensors on CPUs without bf16 instructions.

On CPUs with bf16 instructions, torch multiplies bf16 tensors with oneDNN. On others (x86 with AVX2 only) it uses a
plain loop, which is about a hundred times slower than the same multiplication in fp32: (1040, 384) by (384, 1536) took
5,190 ms in bf16 and 29 to 57 ms in fp32 (two cores of an AMD EPYC with AVX2, torch 2.13.0). FP8 training and image
synthesis spend most of their time in such operations.

By definition, a bf16 matrix multiplication sums exact products of bf16 numbers in fp32, and rounds the sums once to
bf16. This module does the same in three steps: operands are converted to fp32, which is exact, torch multiplies them in
fp32, and the result is rounded to bf16. The example above then takes 37 ms. The torch kernels are replaced for the
whole process, because models of other libraries call them too.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

# The CPU operators for matrix multiplication and convolution that do not call another operator of this list.
WIDENED: Final = (
    "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "_slow_conv2d_forward", "_slow_conv2d_backward.output_mask",
)  # fmt: skip
_library: torch.library.Library | None = None  # kernels stay registered as long as this object exists


def has_fast_bf16() -> bool:
    """Whether torch has fast kernels for bf16 matrix multiplication on this processor."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True  # no other architecture is known to be slow
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def widen_bf16_products(*, force: bool = False) -> bool:
    """Replace torch's bf16 kernels by fp32 computation for the rest of the process, if they are slow on this processor.

    Args:
        force: replace them on any processor.

    Returns:
        Whether bf16 matrices are multiplied in fp32 from now on.
    """
    global _library
    if _library is None and (force or not has_fast_bf16()):
        _library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*overrid")  # overriding is intended
            for name in WIDENED:
                _widen(_library, name)
    return _library is not None


def _widen(library: torch.library.Library, name: str) -> None:
    original: Any = torch.library.get_kernel(f"aten::{name}", "CPU")

    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        if args[0].dtype != torch.bfloat16:
            return original.call_boxed(keys, *args, **kwargs)
        wide = {key: _map(torch.Tensor.float, value) for key, value in kwargs.items()}
        return _map(Tensor.bfloat16, original.call_boxed(keys, *_map(torch.Tensor.float, args), **wide))

    library.impl(name, kernel, "CPU", with_keyset=True, allow_override=True)


def _map(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with `change` applied to every floating-point tensor in it, in nested tuples and lists too."""
    if isinstance(value, tuple | list):
        return type(value)(_map(change, one) for one in value)
    return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value
