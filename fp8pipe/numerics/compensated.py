"""Rounding a weight column by column, each column's error moved onto the columns still to come.

Optimal Brain Surgeon's update with the second moments H = X^T X of the layer's inputs, in blocks of columns: the solver
of GPTQ (arXiv 2210.17323, algorithm 1), for any grid. It makes `|| X (Q - W)^T ||` small although `|| Q - W ||` is not.
Columns go by H's diagonal, the largest first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Compensated", "compensated_round"]


class Compensated(NamedTuple):
    """`(out, in)` fp32: each weight as it stood just `before` its rounding, and that `rounded` to the grid."""

    before: Tensor
    rounded: Tensor


def compensated_round(
    weight: Tensor,
    moments: Tensor,
    round_column: Callable[[Tensor, int], Tensor],
    *,
    block: int,
    damping: float,
    damping_floor: float = 0.0,
    fused: bool = True,
) -> Compensated:
    """Round `weight` so that the error of `X weight^T` is small for inputs with second moments `moments`.

    Args:
        weight: `(out, in)`, any float dtype; not modified.
        moments: `(in, in)` fp32, X^T X up to a factor.
        round_column: gives the grid's values nearest to `(out,)` fp32 values; told the column's index.
        block: columns whose errors stay among themselves before one product spreads them over the rest.
        damping: added to H's diagonal, as a share of its mean.
        damping_floor: added to H's diagonal besides.
        fused: subtract products as they are made, in one rounding; False rounds the product first.
    """
    order = torch.argsort(moments.diagonal(), descending=True, stable=True)
    factor = _inverse_factor(moments[order][:, order], damping, damping_floor)
    work = weight.detach().float().t()[order].contiguous()  # (in, out): an input column is contiguous
    rounded = torch.empty_like(work)
    for start in range(0, work.shape[0], block):
        stop = min(start + block, work.shape[0])
        columns, local, rest = work[start:stop], factor[start:stop, start:stop], factor[start:stop, stop:]
        errors = torch.empty_like(columns)
        for i, place in enumerate(order[start:stop].tolist()):
            rounded[start + i] = round_column(columns[i], place)
            torch.div(columns[i] - rounded[start + i], local[i, i], out=errors[i])
            if fused:
                columns[i + 1 :].addr_(local[i, i + 1 :], errors[i], alpha=-1.0)
            else:
                columns[i + 1 :] -= torch.outer(local[i, i + 1 :], errors[i])
        if fused:
            work[stop:].addmm_(rest.t(), errors, alpha=-1.0)
        else:
            work[stop:] -= (errors.t().contiguous() @ rest).t()
    back = torch.argsort(order)
    return Compensated(work[back].t().contiguous(), rounded[back].t().contiguous())


def _inverse_factor(moments: Tensor, damping: float, floor: float) -> Tensor:
    """Upper Cholesky factor of the damped moments' inverse, `(in, in)` fp32 (computed in fp64)."""
    work = moments.double()
    mean = work.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    work.diagonal().add_(damping * mean + floor)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(work))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    return factor
