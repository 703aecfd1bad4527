"""The adapter's A: directions in input space along which the weights may move.

FALQON takes them from the SVD of the weights' own quantization error E = W - dequantize(quantize(W)): A is
`S_r^(1/2) V_r^T` and B starts at zero, since the quantized backbone already holds the negative of E (arXiv 2510.24061,
section 4). The error's spectrum is nearly flat, so a randomized range finder captures as much energy at a fraction
of the cost. `random` is the released code's other choice. `gradient` (see `gradient.py`) takes the directions along
which the loss falls first; as A never changes, that is what lets a frozen A keep up with a trained one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8pipe.numerics.grids import E4M3, quantize
from fp8pipe.numerics.kinds import ScaleRule
from pipeline.falqon.rules import Initialisation

_OVERSAMPLING = 16  # extra columns of the range finder (Halko, Martinsson, Tropp 2011, section 4.2)
_POWER_ITERATIONS = 3


def quantization_error(weight: Tensor, rule: ScaleRule) -> Tensor:
    """`W - dequantize(quantize(W))` in fp32, shape of `weight`."""
    codes, scale = quantize(weight, E4M3, rule)
    return weight.float() - scale.dequantize(codes)


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
