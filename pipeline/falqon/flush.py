"""Merge selected rows of B into the FP8 codes, in place, after a step.

W and A share one scale. So in code units (values divided by the scale), row i of W becomes
`round(codes(W)[i] + B[i] codes(A))`, without any scale. A flush reads and writes only the k selected rows: k *
in_features bytes instead of the whole matrix.

The final merge is in `pipeline.falqon.final_merge`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp8pipe.numerics.backends import backend
from fp8pipe.numerics.grids import E4M3, row_blocks
from fp8pipe.numerics.kinds import ScaleRule
from pipeline.falqon.layer import FalqonLinear
from pipeline.falqon.rules import Rounding, UpdateRule


@dataclass(frozen=True, slots=True)
class FlushReport:
    """The effect of one flush on one layer; reports can be added to summarize several layers.

    Attributes:
        rows: number of merged rows.
        codes: number of codes in those rows.
        changed: number of codes that changed.
        saturated: number of target values beyond the largest value of the grid.
        intended_square: sum of the squared intended changes, in code units.
        applied_square: sum of the squared applied changes (after rounding), in code units.
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
        """Relative figures, for logs and manifests.

        Returns:
            `changed` and `saturated` as fractions of all codes; `norm_ratio`, the norm of the applied change divided by
            that of the intended change; `cosine`, the cosine of the angle between the two changes.
        """
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
    """Indices of the `count` rows with the largest L1 norm of B, ascending.

    Of rows with equal norms, those with the lowest indices are selected. With the scale of the published code
    (`ScaleRule.EXACT`, used by the update rule `released`), the choice is left to `torch.topk`, as in that code. This
    matters because nearly all norms are equal after AdamW's first step.
    """
    scores = layer.lora_B.detach().abs().sum(dim=-1)
    if count >= scores.numel():
        return torch.arange(scores.numel(), device=scores.device)
    if layer.code_scale.rule is ScaleRule.EXACT:
        # As in the published code with exactly this k, since another k may select different rows of equal norm.
        return torch.topk(scores, k=count).indices.sort().values
    if scores.device.type == "cpu":
        values, rows = torch.topk(scores, count + 1)
        if not count or values[count - 1] != values[count]:  # no tie at the cut-off
            return rows[:count].sort().values
    # Selects the same rows as the CPU path above, without a GPU synchronization.
    return torch.sort(scores, descending=True, stable=True).indices[:count].sort().values


def target_rows(layer: FalqonLinear, rows: Tensor) -> Tensor:
    """`codes(W)[rows] + B[rows] codes(A)` in fp32 code units, `(len(rows), in)`."""
    weight = layer.weight_codes.view(torch.uint8)[rows].view(E4M3.dtype)
    return backend(weight).decode_units(weight) + _update_rows(layer, rows)


def _update_rows(layer: FalqonLinear, rows: Tensor) -> Tensor:
    """`B[rows] codes(A)`: the pending update of `rows` in fp32 code units, `(len(rows), in)`."""
    return layer.lora_B.detach()[rows].float() @ backend(layer.codes).decode_units(layer.adapter_codes)


@torch.no_grad()
def flush_rows(
    layer: FalqonLinear, rows: Tensor, rule: UpdateRule, generator: torch.Generator | None = None, measure: bool = False
) -> FlushReport:
    """Merge `rows` of B into W's codes and clear B as the rule specifies.

    Args:
        layer: changed in place.
        rows: int64 row indices.
        rule: determines the rounding, whether the rounding error is fed back into B, and which rows of B are cleared.
        generator: a CPU generator for stochastic rounding; None uses torch's global one.
        measure: whether to fill in the report, which takes one more pass over the rows.

    Returns:
        A report of the flush; all zeros unless `measure`.
    """
    if rows.numel() == 0:
        return FlushReport()
    if rule.rounding is Rounding.NEAREST and not rule.error_feedback and not measure:
        backend(layer.codes).merge_rows(layer.weight_codes, rows, _update_rows(layer, rows))
        _clear(layer, rows, rule, None)
        return FlushReport()
    old = layer.weight_codes.view(torch.uint8)[rows]
    target = target_rows(layer, rows)
    new = stochastic_round(target, generator) if rule.rounding is Rounding.STOCHASTIC else E4M3.cast(target)
    # In place, as the rows of A are in the same tensor.
    layer.codes.view(torch.uint8).index_copy_(0, rows, new.view(torch.uint8))
    report = flush_report(old.view(E4M3.dtype).float(), target, new.float()) if measure else FlushReport()
    _clear(layer, rows, rule, target - new.float() if rule.error_feedback else None)
    return report


def _clear(layer: FalqonLinear, rows: Tensor, rule: UpdateRule, residual: Tensor | None) -> None:
    b = layer.lora_B.data
    if rule.clear_all:
        b.zero_()
    elif residual is None:
        b.index_fill_(0, rows, 0.0)
    else:
        # Least squares: B's new rows are those for which B A is closest to the rounding residual.
        a = layer.adapter_codes.float()
        solved = torch.linalg.solve(a @ a.t(), a @ residual.t())  # (r, r), (r, k)
        b[rows] = solved.t().to(b.dtype)


def stochastic_round(target: Tensor, generator: torch.Generator | None) -> Tensor:
    """Round each value to the next lower or higher E4M3 value, with probabilities that make the expectation exact.

    Values beyond the range of E4M3 are clamped to it.

    Args:
        target: fp32 code units.
        generator: a CPU generator, whose draws are moved to the target's device; None uses torch's global one.

    Returns:
        float8_e4m3fn codes, same shape.
    """
    clamped = target.clamp(-E4M3.max, E4M3.max)
    exponent = torch.frexp(clamped).exponent - 1  # floor(log2 |x|)
    unit = torch.ldexp(torch.ones_like(clamped), exponent.clamp(min=-6) - E4M3.mantissa_bits)
    draws = torch.rand(clamped.shape, generator=generator).to(clamped.device)
    return E4M3.cast(torch.floor(clamped / unit + draws) * unit)


def flush_report(old: Tensor, target: Tensor, new: Tensor) -> FlushReport:
    """Compare the codes before a flush, its targets and the codes after it (all in fp32 code units, same shape)."""
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
    """Report the effect that flushing every row of B with rounding to nearest would have; changes nothing."""
    every = torch.arange(layer.out_features, device=layer.codes.device)
    blocks = every.split(row_blocks(layer.weight_codes)[0].shape[0])  # as each row needs six fp32 copies
    return sum((rounded_rows(layer, rows)[1] for rows in blocks), FlushReport())


def rounded_rows(layer: FalqonLinear, rows: Tensor) -> tuple[Tensor, FlushReport]:
    """The nearest codes of `rows` of W with B merged, and a report of the change."""
    target = target_rows(layer, rows)
    codes = E4M3.cast(target)
    old = layer.weight_codes.view(torch.uint8)[rows].view(E4M3.dtype)
    return codes, flush_report(old.float(), target, codes.float())
