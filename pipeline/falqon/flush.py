"""Merging rows of B into the FP8 codes, in place: the step that makes FALQON's adapter part of its backbone.

In code units W and A share one scale, so the new row is `round(codes(W)[i] + B[i] codes(A))`, without any scale. Only
the selected rows are read and written, k * (out-row) bytes instead of the whole matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp8pipe.numerics.backends import backend
from fp8pipe.numerics.grids import E4M3
from pipeline.falqon.layer import FalqonLinear
from pipeline.falqon.rules import Rounding, UpdateRule


@dataclass(frozen=True, slots=True)
class FlushReport:
    """What one flush did to one layer (or, summed, to several).

    Attributes:
        rows: rows merged.
        codes: codes in those rows.
        changed: codes that differ afterwards.
        saturated: targets beyond the grid's largest value.
        intended_square: sum of squared intended changes, code units.
        applied_square: sum of squared applied changes, code units.
        inner: inner product of intended and applied changes.
    """

    rows: int = 0
    codes: int = 0
    changed: int = 0
    saturated: int = 0
    intended_square: float = 0.0
    applied_square: float = 0.0
    inner: float = 0.0

    def __add__(self, other: FlushReport) -> FlushReport:
        return FlushReport(*(getattr(self, f) + getattr(other, f) for f in self.__slots__))

    def health(self) -> dict[str, float]:
        """Shares and survival: `changed`, `saturated` (of codes), `norm_ratio` and `cosine` (applied, intended)."""
        codes = max(self.codes, 1)
        norms = (self.intended_square * self.applied_square) ** 0.5
        ratio = (self.applied_square / self.intended_square) ** 0.5 if self.intended_square else 0.0
        return {
            "changed": self.changed / codes,
            "saturated": self.saturated / codes,
            "norm_ratio": ratio,
            "cosine": self.inner / norms if norms else 0.0,
        }


def select_rows(layer: FalqonLinear, count: int) -> Tensor:
    """Indices of the `count` rows with the largest L1 norm of B, ascending; ties go to the lowest index."""
    scores = layer.lora_B.detach().abs().sum(1)
    if count >= scores.numel():
        return torch.arange(scores.numel(), device=scores.device)
    values, rows = torch.topk(scores, count + 1)
    if count and values[count - 1] == values[count]:  # only then does it matter which of the equals come first
        rows = torch.sort(scores, descending=True, stable=True).indices
    return rows[:count].sort().values


def target_rows(layer: FalqonLinear, rows: Tensor) -> Tensor:
    """`codes(W)[rows] + B[rows] codes(A)` in fp32 code units, `(len(rows), in)`."""
    weight = layer.weight_codes.view(torch.uint8)[rows].view(E4M3.dtype)
    return backend(weight).decode_units(weight) + update_rows(layer, rows)


def update_rows(layer: FalqonLinear, rows: Tensor) -> Tensor:
    """`B[rows] codes(A)`: the waiting update of some rows in fp32 code units, `(len(rows), in)`."""
    return layer.lora_B.detach()[rows].float() @ backend(layer.codes).decode_units(layer.adapter_codes)


def write_rows(layer: FalqonLinear, rows: Tensor, codes: Tensor) -> None:
    """Replace W's rows in place; storage and the rows of A keep their place."""
    layer.codes.view(torch.uint8).index_copy_(0, rows, codes.view(torch.uint8))


@torch.no_grad()
def flush_rows(
    layer: FalqonLinear, rows: Tensor, rule: UpdateRule, generator: torch.Generator | None = None, measure: bool = False
) -> FlushReport:
    """Merge `rows` of B into W's codes and clear B as the rule says.

    Args:
        layer: changed in place.
        rows: int64 row indices.
        rule: rounding, feedback and clearing.
        generator: on the CPU, needed for stochastic rounding.
        measure: also compute the report's norms (one more pass over the rows).
    """
    if rows.numel() == 0:
        return FlushReport()
    if rule.rounding is Rounding.NEAREST and not rule.error_feedback and not measure:
        backend(layer.codes).merge_rows(layer.weight_codes, rows, update_rows(layer, rows))
        _clear(layer, rows, rule, None)
        return FlushReport()
    old = layer.weight_codes.view(torch.uint8)[rows]
    target = target_rows(layer, rows)
    if rule.rounding is Rounding.STOCHASTIC:
        new = stochastic_round(target, generator)
    else:
        new = E4M3.cast(target)
    write_rows(layer, rows, new)
    report = flush_report(old.view(E4M3.dtype).float(), target, new.float()) if measure else FlushReport()
    _clear(layer, rows, rule, target - new.float() if rule.error_feedback else None)
    return report


def _clear(layer: FalqonLinear, rows: Tensor, rule: UpdateRule, refused: Tensor | None) -> None:
    b = layer.lora_B.data
    if rule.clear_all:
        b.zero_()
    elif refused is None:
        b.index_fill_(0, rows, 0.0)
    else:
        # Least squares: the multiple of A's rows closest to what rounding refused.
        a = layer.adapter_codes.float()
        solved = torch.linalg.solve(a @ a.t(), a @ refused.t())  # (r, r), (r, k)
        b[rows] = solved.t().to(b.dtype)


def stochastic_round(target: Tensor, generator: torch.Generator | None) -> Tensor:
    """Round to E4M3 up or down with probabilities that make the result unbiased; saturating.

    Args:
        target: fp32 code units.
        generator: on the CPU; its draws are moved to the target's device.

    Returns:
        float8_e4m3fn codes, same shape.
    """
    clamped = target.clamp(-E4M3.max, E4M3.max)
    exponent = torch.frexp(clamped).exponent - 1  # floor(log2 |x|)
    unit = torch.ldexp(torch.ones_like(clamped), exponent.clamp(min=-6) - E4M3.mantissa_bits)
    draws = torch.rand(clamped.shape, generator=generator).to(clamped.device)
    return E4M3.cast(torch.floor(clamped / unit + draws) * unit)


def flush_report(old: Tensor, target: Tensor, new: Tensor) -> FlushReport:
    """Compare the codes before, the target and the codes after a flush (all fp32 code units, same shape)."""
    intended, applied = target - old, new - old
    sums = torch.stack([intended.square().sum(), applied.square().sum(), (intended * applied).sum()]).tolist()
    return FlushReport(
        rows=old.shape[0],
        codes=old.numel(),
        changed=int((applied != 0).sum()),
        saturated=int((target.abs() > E4M3.max).sum()),
        intended_square=sums[0],
        applied_square=sums[1],
        inner=sums[2],
    )


@torch.no_grad()
def preview(layer: FalqonLinear) -> FlushReport:
    """What a nearest-rounding flush of every row would do now; changes nothing."""
    rows = torch.arange(layer.out_features, device=layer.codes.device)
    target = target_rows(layer, rows)
    return flush_report(layer.weight_codes.float(), target, E4M3.cast(target).float())
