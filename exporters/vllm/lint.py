"""The gate before writing: every rule runs, and every finding is kept.

Rules on names and shapes are in `lint_structure`. Here are those that look at the numbers: one pass over the source,
one tensor in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from exporters.vllm.lint_structure import found, lint_structure
from exporters.vllm.plan import ExportPlan, Unit, tied_original
from fp8pipe.artifact.finding import Finding
from fp8pipe.models.checkpoint.tensors import PLAIN_FLOATS, TensorEntry, header_entries, read_tensor
from fp8pipe.numerics.grids import E4M3, same_bits

ADAPTER_FILE = "adapter.safetensors"
# A weight matrix whose largest magnitude exceeds this, while the reciprocal scale would put it below
# `PLAUSIBLE_AMAX`, was stored with a quantizing scale (448/amax): trained weights stay far below 100.
IMPLAUSIBLE_AMAX = 1000.0
PLAUSIBLE_AMAX = 448.0
# Elements looked at together, so that masks of a large embedding stay small.
CHUNK = 1 << 24


def lint(plan: ExportPlan, advance: Callable[[], None] = lambda: None) -> list[Finding]:
    """All findings, those of structure first; reads the source once, and calls `advance` once per tensor."""
    findings = lint_structure(plan)
    for unit in (*plan.units, *plan.dropped):
        findings += _unit(unit)
        advance()
    return [*findings, *_tied(plan), *_adapter(plan)]


def _unit(unit: Unit) -> Iterator[Finding]:
    if unit.entry.dtype == "F8_E4M3":
        nan_codes = _count(read_tensor(unit.entry).view(torch.uint8), lambda part: (part & 0x7F) == 0x7F)
        if nan_codes:
            yield found("nan-code", unit.entry.name, f"{nan_codes} code(s) 0x7F or 0xFF, which E4M3 reads as NaN")
        if unit.scale is not None and unit.scale.dtype == "F32":
            yield from _scale(unit.scale)
    elif unit.entry.dtype in PLAIN_FLOATS:
        bad = _count(read_tensor(unit.entry), lambda part: ~torch.isfinite(part))
        if bad:
            yield found("not-finite", unit.entry.name, f"{bad} NaN or infinite value(s)")


def _scale(entry: TensorEntry) -> Iterator[Finding]:
    scale = read_tensor(entry).reshape(-1)
    bad = int((~torch.isfinite(scale)).sum())
    if bad:
        yield found("scale-not-finite", entry.name, f"{bad} NaN or infinite scale(s)")
        return
    if int((scale <= 0).sum()):
        yield found("scale-not-positive", entry.name, f"smallest scale {float(scale.min()):g}; scales are positive")
        return
    middle = float(scale.median())
    amax, reciprocal_amax = E4M3.max * middle, E4M3.max / middle
    if amax > IMPLAUSIBLE_AMAX and reciprocal_amax < PLAUSIBLE_AMAX:
        why = f"scale {middle:g} means weights up to {amax:g}; its reciprocal would mean {reciprocal_amax:g}"
        yield found("scale-reciprocal", entry.name, why)


def _tied(plan: ExportPlan) -> Iterator[Finding]:
    for unit in plan.dropped:
        name = plan.structure.tied[unit.entry.name]
        original = tied_original(name, plan.source, plan.structure)
        if original is not None and not same_bits(read_tensor(unit.entry), read_tensor(original)):
            yield found(
                "tied-differs", unit.entry.name, f"config.json ties it to {original.name}, but their values differ"
            )


def _adapter(plan: ExportPlan) -> Iterator[Finding]:
    path = plan.source.root / ADAPTER_FILE
    if not plan.source.holds_codes or not path.is_file():
        return
    for name, entry in header_entries(path).items():
        if name.endswith(".lora_B") and (pending := _count(read_tensor(entry), lambda part: part != 0)):
            yield found("adapter-not-flushed", name, f"{pending} non-zero value(s) that the weights do not hold")


def _count(values: Tensor, test: Callable[[Tensor], Tensor]) -> int:
    parts = torch.split(values.reshape(-1), CHUNK) if values.numel() else ()
    return sum(int(test(part).sum()) for part in parts)
