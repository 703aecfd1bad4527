"""Products of bf16 tensors on processors that have no bf16 arithmetic.

torch's CPU products of bf16 tensors come from oneDNN where the processor multiplies bf16. Elsewhere (x86 with AVX2
only) a plain loop takes their place, a hundred times slower than the same product in fp32: (1040, 384) by (384, 1536)
took 5,190 ms against 29 to 57 ms (two cores of an AMD EPYC with AVX2, torch 2.13.0). Training in FP8 and synthesis
both live on such products.

A bf16 product is, by definition, exact products of bf16 numbers, summed in fp32, rounded to bf16 once. So it is
computed that way here: operands are widened to fp32, which is exact, torch multiplies them, and the result is rounded.
Same semantics, other kernel; 37 ms for the product above. The kernels are replaced for the whole process, since
products happen everywhere, in the models of other libraries too.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

# Every operator that ends in a product on a CPU, and is not itself made of one of the others.
WIDENED: Final = (
    "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "_slow_conv2d_forward", "_slow_conv2d_backward.output_mask",
)  # fmt: skip
_library: torch.library.Library | None = None  # registrations live as long as this object


def has_fast_bf16() -> bool:
    """Whether torch has fast products of bf16 tensors on this processor."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True  # not known to be slow anywhere else
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def widen_bf16_products(*, force: bool = False) -> bool:
    """Compute bf16 products in fp32 for the rest of the process, where the processor has no fast ones.

    Args:
        force: also where it has.

    Returns:
        Whether they are widened now.
    """
    global _library
    if _library is None and (force or not has_fast_bf16()):
        _library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*overrid")  # which is the intention
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
    """The same with every floating-point tensor changed."""
    if isinstance(value, tuple | list):
        return type(value)(_map(change, one) for one in value)
    return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value
