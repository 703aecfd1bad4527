"""Weights in NVFP4: their global scales, what is written of them, and the rules that only they must obey.

A global scale depends on the largest weight of all layers that the engine fuses, so one more pass over the source comes
before the first byte is written. Everything else is computed from a few rows at a time.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from exporters.vllm.blocks import by_unit, scale_of
from exporters.vllm.options import VllmExportOptions
from exporters.vllm.plan import ExportPlan, Unit, fused_siblings
from exporters.vllm.values import count_bad, value_findings
from fp8pipe.artifact import Artifact
from fp8pipe.artifact.finding import Finding, refuse
from fp8pipe.models.checkpoint.packed import COMPRESSED_TENSORS, LAYOUTS, PackedEntry, PackedLayout
from fp8pipe.models.checkpoint.rows import read_rows
from fp8pipe.models.checkpoint.tensors import DTYPES, TensorHeader, read_tensor
from fp8pipe.numerics.grids import dequantize_weight
from fp8pipe.numerics.nvfp4_weights import (
    LARGEST_GLOBAL_SCALE,
    SMALLEST_BLOCK_SCALE,
    SMALLEST_GLOBAL_SCALE,
    global_scale,
    quantize_packed,
)

__all__ = [
    "fused_units",
    "packed_findings",
    "packed_tensors",
    "stored_layout",
    "unfit",
    "value_rows",
    "with_global_scales",
]

_WRITE_AGAIN: Final = "export the model again"
_Pieces = list[tuple[TensorHeader, int, Tensor]]


def stored_layout(export: Artifact) -> PackedLayout:
    """How an export to vLLM names and stores weights in NVFP4, and tensors of one number."""
    return LAYOUTS[VllmExportOptions.model_validate(export.manifest.config).layout]


def value_rows(unit: Unit, rows: range, stored: Tensor) -> Tensor:
    """The values of some rows of a source tensor; FP8 codes are dequantized, in fp32.

    Args:
        unit: the tensor.
        rows: indices of the rows.
        stored: these rows as the source holds them.
    """
    return stored if unit.scale is None else dequantize_weight(stored, scale_of(unit.scale, unit, rows))


def fused_units(plan: ExportPlan) -> list[list[Unit]]:
    """The weights in NVFP4, by groups that share a global scale: those that the engine fuses, and all others alone."""
    units = {unit.module or "": unit for unit in plan.units if unit.packed}
    fused = [[units.pop(name) for name in group if name in units]
             for group in fused_siblings(list(units), plan.schema.fused_groups)]  # fmt: skip
    return [group for group in fused if group] + [[unit] for unit in units.values()]


def with_global_scales(plan: ExportPlan) -> ExportPlan:
    """The plan with the global scale of every weight that is rounded to NVFP4; reads these weights once.

    Raises:
        LintFindingsError: a weight is not finite (`not-finite`, `nan-code`, or a rule about its scale), or too large
            for NVFP4 (`weight-range`).
    """
    rounded = [[unit for unit in group if not isinstance(unit.entry, PackedEntry)] for group in fused_units(plan)]
    if not any(rounded):
        return plan
    amax, findings = _amax([unit for group in rounded for unit in group])
    scales: dict[str, float] = {}
    for group in rounded:
        known = {unit.entry.name: amax[unit.entry.name] for unit in group if unit.entry.name in amax}
        try:
            scale = global_scale(max(known.values(), default=0.0))
        except ValueError as error:
            worst = max(known, key=lambda name: known[name])
            findings.append(Finding("weight-range", worst, str(error), "export with --format fp8, or bf16"))
            continue
        scales |= dict.fromkeys(known, scale)
    refuse(findings, str(plan.source.root))
    shards = tuple(
        tuple(replace(unit, global_scale=scales.get(unit.entry.name)) for unit in shard) for shard in plan.shards
    )
    return replace(plan, shards=shards)


def _amax(units: list[Unit]) -> tuple[dict[str, float], list[Finding]]:
    """Largest magnitudes by name, and findings about weights that are not finite, which have none.

    It is infinite for FP8 codes whose product with their scale overflows.
    """

    def largest(unit: Unit, rows: range) -> tuple[float, int]:
        stored = read_rows(unit.entry, rows)
        values = value_rows(unit, rows, stored)
        amax = max(abs(float(end)) for end in values.aminmax()) if values.numel() else 0.0
        return math.inf if math.isnan(amax) else amax, count_bad(stored)  # max() ignores NaN in some orders

    found, findings = {}, []
    for unit, blocks in by_unit(units, largest):
        amax = max((one for one, _ in blocks), default=0.0)
        bad = [] if math.isfinite(amax) else [*value_findings(unit, sum(count for _, count in blocks))]
        findings += bad
        if not bad:
            found[unit.entry.name] = amax
    return found, findings


def packed_tensors(unit: Unit, rows: range, stored: Tensor) -> _Pieces:
    """What is written of some rows of a weight in NVFP4: header, byte offset in the tensor, and values of each part.

    Args:
        unit: the weight.
        rows: indices of the rows.
        stored: these rows as the source holds them; for a weight that is in NVFP4 already, as read by its entry.

    Raises:
        ValueError: the export does not store it in NVFP4, or it has no global scale, because `with_global_scales` was
            not called.
    """
    if unit.layout is None:
        raise ValueError(f"{unit.entry.name}: the export does not store it in NVFP4")
    if isinstance(unit.entry, PackedEntry):
        scale = unit.entry.read_global_scale()
        packed, blocks = read_rows(unit.entry.packed, rows), read_rows(unit.entry.blocks, rows)
    else:
        if unit.global_scale is None:
            raise ValueError(f"{unit.entry.name}: no global scale was chosen")
        scale = unit.global_scale
        packed, blocks = quantize_packed(value_rows(unit, rows, stored), scale)
    whole = torch.full(unit.layout.shape, unit.layout.stored(scale), dtype=torch.float32)
    pieces: _Pieces = []
    for header, tensor in zip(unit.outputs, (packed, blocks), strict=False):
        pieces.append((header, rows.start * math.prod(header.shape[1:]) * DTYPES[header.dtype].itemsize, tensor))
    return [*pieces, (unit.outputs[2], 0, whole)] if rows.start == 0 else pieces


def packed_findings(plan: ExportPlan) -> Iterator[Finding]:
    """Findings about the scales of weights that are stored in NVFP4; reads the scales, not the codes."""
    for group in fused_units(plan):
        wholes: dict[str, float] = {}
        layout = COMPRESSED_TENSORS
        for unit in group:
            if isinstance(unit.entry, PackedEntry):
                yield from _block_scales(unit.entry)
                layout = unit.entry.layout
                wholes[unit.entry.whole.name] = float(read_tensor(unit.entry.whole).reshape(-1)[0])
        yield from _global_scales(wholes, layout)


def _block_scales(entry: PackedEntry) -> Iterator[Finding]:
    codes = read_tensor(entry.blocks).view(torch.uint8)
    name = entry.blocks.name
    if bad := int(((codes & 0x7F) == 0x7F).sum()):
        yield Finding("scale-not-finite", name, f"{bad} block scale(s) are NaN", _WRITE_AGAIN)
    elif bad := int(((codes == 0) | (codes >= 0x80)).sum()):
        yield Finding("scale-not-positive", name, f"{bad} block scale(s) are zero or negative", _WRITE_AGAIN)
    elif bad := int((codes < 0x08).sum()):
        why = f"{bad} block scale(s) are below {SMALLEST_BLOCK_SCALE:g}; vLLM's Marlin kernel replaces them by zero"
        yield Finding("scale-subnormal", name, why, _WRITE_AGAIN)


def _global_scales(stored: dict[str, float], layout: PackedLayout) -> Iterator[Finding]:
    """Findings about the global scales of layers that the engine fuses, given the stored numbers by name."""
    for name, number in stored.items():
        if why := unfit(number, layout):
            yield Finding("global-scale", name, f"{why}, so products are not exact", _WRITE_AGAIN)
    yield from _unequal(stored)


def unfit(number: float, layout: PackedLayout) -> str:
    """Why a stored number cannot be a global scale; empty if it can."""
    low, high = sorted(map(layout.stored, (SMALLEST_GLOBAL_SCALE, LARGEST_GLOBAL_SCALE)))
    if math.isfinite(number) and low <= number <= high and math.frexp(number)[0] == 0.5:
        return ""
    why = f"{number:g} is not a power of two from {low:g} to {high:g}"
    if number > 0 and low <= 1 / number <= high:
        what = "a divisor, the reciprocal of the global scale" if layout.divides else "the global scale itself"
        why += f" (the stored number is {what})"
    return why


def _unequal(stored: dict[str, float]) -> Iterator[Finding]:
    by_value: dict[float, list[str]] = defaultdict(list)
    for name, number in stored.items():
        by_value[number].append(name)
    if len(by_value) > 1:
        said = ", ".join(f"{name} {number:g}" for number, names in by_value.items() for name in names)
        why = f"the engine fuses these layers and uses the largest for all, which changes weights: {said}"
        yield Finding("fused-scale", next(iter(stored)), why, _WRITE_AGAIN)
