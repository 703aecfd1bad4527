"""Compares weights in NVFP4 with their source: codes, block scales and global scales, byte for byte.

The expected bytes are computed by `numerics.plain_nvfp4`, which shares no code with the quantizer. So are the global
scales, from the source's values: if the layers that an engine fuses had other scales, it would serve other weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, NamedTuple

import torch
from torch import Tensor

from exporters.vllm.blocks import scale_of
from exporters.vllm.nvfp4 import fused_units
from exporters.vllm.plan import ExportPlan, Unit
from exporters.vllm.reopen_files import none_differing
from fp8pipe.artifact import Gate
from fp8pipe.models.checkpoint.packed import PackedEntry
from fp8pipe.models.checkpoint.rows import read_rows
from fp8pipe.models.checkpoint.tensors import TensorEntry, read_tensor
from fp8pipe.numerics.grids import same_bits
from fp8pipe.numerics.nvfp4_weights import SEARCHED
from fp8pipe.numerics.plain import dequantize_plain
from fp8pipe.numerics.plain_nvfp4 import (
    PlainNvfp4,
    block_errors,
    dequantize_nvfp4,
    global_scale_plain,
    quantize_nvfp4,
)

__all__ = ["NVFP4_ERROR_BOUND", "PackedBlock", "compare_packed", "global_scales_gate", "rounded"]

# Relative error of a block of 16. The scale nearest to amax / 6 maps the largest weight to 5.6 at least and to 6.4 at
# most. An element below 1.25 is off by at most 1/4, and a larger one by a fifth of itself. So the error is at most
# sqrt(0.2^2 + 15 / 16 / 5.6^2) = 0.2645 of the norm; a scale that was preferred to it has a smaller one.
NVFP4_ERROR_BOUND: Final = 0.265


class PackedBlock(NamedTuple):
    """The result of comparing some rows: whether all bytes are the expected ones, rounding error, largest magnitude."""

    same: bool
    error: float
    amax: float


def rounded(unit: Unit, original: Tensor, scale: Tensor | None) -> PlainNvfp4:
    """What some rows of a source tensor are in NVFP4, computed by independent arithmetic.

    Args:
        unit: the weight, with its global scale.
        original: the rows as stored in the source.
        scale: for FP8 codes, their scale.

    Raises:
        ValueError: the unit has no global scale, because `with_global_scales` was not called.
    """
    if unit.global_scale is None:
        raise ValueError(f"{unit.entry.name}: no global scale was chosen")
    return quantize_nvfp4(_values(original, scale), unit.global_scale, SEARCHED)


def compare_packed(unit: Unit, rows: range, written: Mapping[str, TensorEntry]) -> PackedBlock:
    """Compare some rows of a weight in the written files with the bytes that they must have."""
    packed, blocks = (read_rows(written[output.name], rows) for output in unit.outputs[:2])
    if isinstance(unit.entry, PackedEntry):
        expected = [read_rows(part, rows) for part in unit.entry.parts[:2]]
        return PackedBlock(_same(packed, blocks, *expected), 0.0, 0.0)
    original, scale = read_rows(unit.entry, rows), None if unit.scale is None else scale_of(unit.scale, unit, rows)
    true, wanted = _values(original, scale), rounded(unit, original, scale)
    whole = float(read_tensor(written[unit.outputs[2].name]).reshape(-1)[0])
    divisor = whole if _divides(unit) else _reciprocal(whole)
    error = block_errors(dequantize_nvfp4(packed, blocks, divisor), true, unit.global_scale or 1.0)
    amax = float(true.abs().max()) if true.numel() else 0.0
    return PackedBlock(_same(packed, blocks, wanted.packed, wanted.scale), error, amax)


def global_scales_gate(plan: ExportPlan, amax: Mapping[str, float], written: Mapping[str, TensorEntry]) -> Gate:
    """Gate: every stored global scale follows from the largest weight of the layers that the engine fuses.

    Args:
        plan: the export's plan.
        amax: largest magnitude of each weight that the export rounded, by the source tensor's name.
        written: the written tensors by name.
    """
    wrong, count = [], 0
    for group in fused_units(plan):
        largest = max(amax.get(unit.entry.name, 0.0) for unit in group)
        for unit in group:
            count += 1
            stored = read_tensor(written[unit.outputs[2].name])
            scale = global_scale_plain(largest)
            if isinstance(unit.entry, PackedEntry):
                whole = float(read_tensor(unit.entry.whole).reshape(-1)[0])
                scale = _reciprocal(whole) if unit.entry.layout.divides else whole
            expected = torch.full(unit.outputs[2].shape, _reciprocal(scale) if _divides(unit) else scale)
            wrong += [] if same_bits(stored, expected) else [unit.outputs[2].name]
    return none_differing("global-scales", wrong, f"{count} global scale(s), one for all layers that the engine fuses")


def _divides(unit: Unit) -> bool:
    """Whether the export stores the reciprocal of the weight's global scale."""
    return unit.layout is not None and unit.layout.divides


def _reciprocal(number: float) -> float:
    return 1.0 / number if number else math.inf


def _values(original: Tensor, scale: Tensor | None) -> Tensor:
    return original.float() if scale is None else dequantize_plain(original, scale)


def _same(packed: Tensor, blocks: Tensor, wanted: Tensor, scales: Tensor) -> bool:
    return same_bits(packed, wanted) and same_bits(blocks, scales)
