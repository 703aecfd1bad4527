"""The adapter's A: directions in input space along which the weights may move.

FALQON takes them from the SVD of the weights' own quantization error E = W - dequantize(quantize(W)): A is
`S_r^(1/2) V_r^T` and B starts at zero, since the quantized backbone already holds the negative of E (arXiv 2510.24061,
section 4). The error's spectrum is nearly flat, so a randomized range finder captures as much energy at a fraction
of the cost. `random` is the released code's other choice. `gradient` takes the directions along which the loss falls
first; as A never changes, that is what lets a frozen A keep up with a trained one.

These are the leading right singular vectors of dL/dW = G^T X. Neither dW nor all of X is ever stored: a few batches
run backward through the base model twice. The first pass sketches the range of dW^T as `X^T (G S)` with a thin random
S; the second measures dW on that range, `G^T (X Q)`, whose SVD picks the leading directions within it (Halko,
Martinsson, Tropp 2011, algorithms 4.1 and 5.1). Starting an adapter at the gradient is LoRA-GA's idea (arXiv
2407.05000).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fp8pipe.models.language.experts import call_every_expert, in_experts
from fp8pipe.numerics.grids import E4M3, row_blocks, stacked_scale
from fp8pipe.numerics.kinds import ScaleRule
from pipeline.falqon.observed import Losses, observe
from pipeline.falqon.rules import Initialisation

_OVERSAMPLING = 16  # extra columns of the range finder (Halko, Martinsson, Tropp 2011, section 4.2)
_POWER_ITERATIONS = 3
_SKETCH_FACTOR = 3  # columns of the gradient's sketch for each direction: no power iterations are there to sharpen it


def quantization_error(weight: Tensor, rule: ScaleRule) -> Tensor:
    """`W - dequantize(quantize(W))` in fp32, shape of `weight`; little more than the result is held at once."""
    scale = stacked_scale([weight], E4M3, rule)
    error = torch.empty(weight.shape, device=weight.device)
    for found, rows in zip(row_blocks(error), row_blocks(weight), strict=True):
        values = rows.float()
        torch.sub(values, scale.dequantize(scale.quantize(values, E4M3)), out=found)
    return error


def adapter_directions(
    weight: Tensor,
    rank: int,
    how: Initialisation,
    rule: ScaleRule,
    generator: torch.Generator,
    gradient_rows: Tensor | None = None,
) -> Tensor:
    """A in fp32, `(rank, in)`, on the weight's device.

    Args:
        weight: `(out, in)`, high precision.
        rank: at most `min(out, in)`.
        how: the initialisation.
        rule: scale rule under which the error arises.
        generator: on the CPU; source of the random draws, so that a seed fixes A.
        gradient_rows: `(rank, in)` orthonormal rows, needed by `gradient` alone.

    Raises:
        ValueError: rank out of range, or `gradient` without its rows.
    """
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank {rank} is outside 1..{min(weight.shape)}")
    if how is Initialisation.RANDOM:
        flat = weight.float()
        draws = torch.randn(rank, weight.shape[1], generator=generator).to(weight.device)
        return (flat.mean() + flat.std() * draws).clamp(flat.min(), flat.max())
    error = quantization_error(weight, rule)
    if how is Initialisation.GRADIENT:
        if gradient_rows is None:
            raise ValueError("the gradient initialisation needs the gradient's directions")
        # The length that the error's SVD would give on average, so that one learning rate serves both: the root of
        # a typical singular value, which for a flat spectrum is ||E|| / sqrt(min(out, in)).
        length: Tensor = (error.norm() / min(weight.shape) ** 0.5).sqrt()
        return gradient_rows * length
    if how is Initialisation.SVD:
        _, values, right = torch.linalg.svd(error, full_matrices=False)
    else:
        values, right = _randomized_right_vectors(error, rank, generator)
    lengths: Tensor = values[:rank].sqrt().unsqueeze(1)
    rows: Tensor = lengths * right[:rank]
    return rows


def _randomized_right_vectors(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Leading singular values and right vectors by a subspace iteration from the smaller side."""
    width = min(rank + _OVERSAMPLING, *matrix.shape)
    sketch = torch.randn(matrix.shape[0], width, generator=generator).to(matrix.device)
    basis = torch.linalg.qr(matrix.t() @ sketch).Q  # (in, width)
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix.t() @ torch.linalg.qr(matrix @ basis).Q).Q
    # matrix ~ (matrix basis) basis^T; the small SVD rotates the basis onto singular vectors.
    _, values, rotation = torch.linalg.svd(matrix @ basis, full_matrices=False)
    return values, rotation @ basis.t()


def gradient_sketches(
    model: nn.Module, groups: Sequence[Sequence[str]], losses: Losses, rank: int, seed: int
) -> dict[str, Tensor]:
    """Leading input directions of each group's gradient.

    Args:
        model: unconverted, in its training dtype; left as it was found.
        groups: module paths; the members of a group share their input and get one set of directions.
        losses: runs the batches, yielding each one's loss with gradient; called twice, for the same batches.
        rank: directions a group.
        seed: of the random test matrices.

    Returns:
        By first member: `(rank, in)` fp32 with orthonormal rows; none of experts that no token of the batches reached.

    Raises:
        ConfigurationError: another layer that no token of the batches reached.
    """
    generator = torch.Generator().manual_seed(seed)
    tests: dict[str, Tensor] = {}

    def sketch(x: Tensor, g: Tensor, name: str) -> Tensor:
        if name not in tests:  # one S a module for all batches: the sketch is of the summed gradient
            width = min(_SKETCH_FACTOR * rank, x.shape[1])
            tests[name] = torch.randn(g.shape[1], width, generator=generator).to(g)
        return (x.t() @ (g @ tests[name])).float()  # (n, T) @ ((T, m) @ (m, width))

    ranges: dict[str, Tensor] = {}
    with call_every_expert(model):
        sketched = observe(model, groups, losses, sketch)
    for group, parts in zip(groups, sketched, strict=True):
        ranges |= dict.fromkeys(group, torch.linalg.qr(torch.stack(parts).sum(0)).Q)
    tests.clear()

    def measure(x: Tensor, g: Tensor, name: str) -> Tensor:
        return (g.t() @ (x @ ranges[name].to(x))).float()  # (m, T) @ ((T, n) @ (n, width))

    directions = {}
    with call_every_expert(model):
        measured = observe(model, groups, losses, measure)
    for group, parts in zip(groups, measured, strict=True):
        stacked = torch.cat(parts)
        if in_experts(model, group[0]) and not bool(stacked.any()):
            continue  # the gradient says nothing of it
        _, _, rotation = torch.linalg.svd(stacked, full_matrices=False)
        directions[group[0]] = (rotation[:rank] @ ranges[group[0]].t()).contiguous()
    return directions
