"""The linter's rules about the values of one tensor and its scale: not finite, not positive, or stored inverted.

The linter, the writer and the choice of global scales for NVFP4 read tensors in passes of their own, with these rules.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from exporters.vllm.plan import Unit
from fp8pipe.artifact.finding import Finding
from fp8pipe.models.checkpoint.tensors import TensorEntry, read_tensor
from fp8pipe.models.checkpoint.values import count_not_finite
from fp8pipe.numerics.grids import E4M3

__all__ = ["count_bad", "value_findings"]

# If the scale implies an amax above the first value, and its reciprocal one below the second, the scale was stored
# inverted (448/amax instead of amax/448): the amax of trained weights stays far below 100.
_IMPLAUSIBLE_AMAX: Final = 1000.0
_PLAUSIBLE_AMAX: Final = 448.0
_FIXES: Final = {
    "scale-not-finite": "write the artifact again",
    "scale-not-positive": "write the artifact again",
    "scale-reciprocal": "store amax/448 (dequantized = code * scale), not 448/amax",
    "nan-code": "train again: a weight became NaN",
    "not-finite": "repair or retrain the model",
}


def count_bad(values: Tensor) -> int:
    """Count the NaN codes of an E4M3 tensor, or the NaN and infinite values of another float tensor; else 0."""
    if values.dtype == torch.float8_e4m3fn:
        return int(((values.view(torch.uint8) & 0x7F) == 0x7F).sum())
    return count_not_finite(values) if values.dtype.itemsize > 1 else 0


def value_findings(unit: Unit, bad: int) -> Iterator[Finding]:
    """Findings about the values of a unit's tensor and scale; `bad` is the sum of `count_bad` over its blocks."""
    if unit.entry.dtype == "F8_E4M3":
        if bad:
            yield _found("nan-code", unit.entry.name, f"{bad} code(s) 0x7F or 0xFF, which E4M3 reads as NaN")
        if unit.scale is not None and unit.scale.dtype == "F32":
            yield from _scale(unit.scale)
    elif bad:
        yield _found("not-finite", unit.entry.name, f"{bad} NaN or infinite value(s)")


def _scale(entry: TensorEntry) -> Iterator[Finding]:
    # Findings on a scale: not finite, not positive, or stored inverted.
    scale = read_tensor(entry).reshape(-1)
    bad = int((~torch.isfinite(scale)).sum())
    if bad:
        yield _found("scale-not-finite", entry.name, f"{bad} NaN or infinite scale(s)")
    elif int((scale <= 0).sum()):
        yield _found("scale-not-positive", entry.name, f"smallest scale {float(scale.min()):g}; scales are positive")
    else:
        middle = float(scale.median())
        amax, reciprocal_amax = E4M3.max * middle, E4M3.max / middle
        if amax > _IMPLAUSIBLE_AMAX and reciprocal_amax < _PLAUSIBLE_AMAX:
            why = f"scale {middle:g} implies weights up to {amax:g}; its reciprocal, {reciprocal_amax:g}"
            yield _found("scale-reciprocal", entry.name, why)


def _found(rule: str, tensor: str, why: str) -> Finding:
    return Finding(rule, tensor, why, _FIXES[rule])
