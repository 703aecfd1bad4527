"""The adapter's A: directions in input space along which the weights may move.

The FALQON paper (arXiv 2510.24061, section 4) takes them from the SVD of the weights' own quantization error
E = W - dequantize(quantize(W)): A is `S_r^(1/2) V_r^T`, and B starts at zero, since the quantized weights already
contain the negative of E (`svd`). The error's spectrum is nearly flat, so a randomized range finder captures as much of
its energy at a fraction of the cost (`randomized-svd`). The released code also has `random`. `gradient` takes the
directions along which the loss initially falls fastest, for an A that stays frozen; `uniform` draws A as peft draws
LoRA's, for an A that is trained (`docs/update-rules.md` compares the two).

The directions of `gradient` are the leading right singular vectors of dL/dW = G^T X, where X is a layer's input and G
the gradient of its output. Neither dL/dW nor all of X is ever stored: a few batches run forward and backward through
the base model twice. The first run sketches the range of (dL/dW)^T as `X^T (G S)` with a thin random S. The second run
projects dL/dW onto an orthonormal basis Q of that range, `G^T (X Q)`; the SVD of the projection gives the directions
(Halko, Martinsson, Tropp 2011, algorithms 4.1 and 5.1). Initialising an adapter from the gradient was proposed by
LoRA-GA (arXiv 2407.05000).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.language.experts import call_every_expert, in_experts
from fp8pipe.numerics.grids import E4M3, row_blocks, stacked_scale
from fp8pipe.numerics.kinds import ScaleRule
from pipeline.falqon.observed import Losses, observe
from pipeline.falqon.rules import Initialisation
from pipeline.falqon.sums import Sums

_OVERSAMPLING = 16  # extra columns of the range finder (Halko, Martinsson, Tropp 2011, section 4.2)
_POWER_ITERATIONS = 3
_SKETCH_FACTOR = 3  # sketch columns per direction of the gradient: oversampled, as there are no power iterations


def quantization_error(weight: Tensor, rule: ScaleRule) -> Tensor:
    """`W - dequantize(quantize(W))` in fp32, shape of `weight`; computed in row blocks to save memory."""
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
        weight: `(out, in)`, in high precision.
        rank: at most `min(out, in)`.
        how: the initialisation.
        rule: the scale rule whose quantization error is decomposed.
        generator: a CPU generator for the random draws, so that a seed determines A.
        gradient_rows: `(rank, in)` with orthonormal rows, the leading directions of the gradient; needed only by the
            `gradient` initialisation.

    Raises:
        ValueError: the rank is out of range, or `gradient_rows` is missing for `gradient`.
    """
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank {rank} is outside 1..{min(weight.shape)}")
    if how is Initialisation.RANDOM:
        flat = weight.float()
        draws = torch.randn(rank, weight.shape[1], generator=generator).to(weight.device)
        return (flat.mean() + flat.std() * draws).clamp(flat.min(), flat.max())
    if how is Initialisation.UNIFORM:
        # No larger than the weights, so that the scale that both share is that of the weights alone.
        bound = min(weight.shape[1] ** -0.5, float(weight.abs().max()))
        a: Tensor = bound * (2 * torch.rand(rank, weight.shape[1], generator=generator) - 1)
        return a.to(weight.device)
    error = quantization_error(weight, rule)
    if how is Initialisation.GRADIENT:
        if gradient_rows is None:
            raise ValueError("the gradient initialisation needs the gradient's directions")
        # The rows are scaled to the norm that rows from the SVD typically have, so that the same learning rate suits
        # both: the square root of a typical singular value, which for a flat spectrum is ||E|| / sqrt(min(out, in)).
        length: Tensor = (error.norm() / min(weight.shape) ** 0.5).sqrt()
        return gradient_rows.to(length.device) * length
    if how is Initialisation.SVD:
        _, values, right = torch.linalg.svd(error, full_matrices=False)
    else:
        values, right = _randomized_right_vectors(error, rank, generator)
    lengths: Tensor = values[:rank].sqrt().unsqueeze(1)
    rows: Tensor = lengths * right[:rank]
    return rows


def _randomized_right_vectors(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Leading singular values, `(width,)`, and right singular vectors, `(width, in)`, with width >= rank.

    Computed by subspace iteration on a random sketch of the matrix's row space.
    """
    width = min(rank + _OVERSAMPLING, *matrix.shape)
    sketch = torch.randn(matrix.shape[0], width, generator=generator).to(matrix.device)
    basis = torch.linalg.qr(matrix.t() @ sketch).Q  # (in, width)
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix.t() @ torch.linalg.qr(matrix @ basis).Q).Q
    # matrix ~ (matrix basis) basis^T; the SVD of the thin product in parentheses rotates the basis to singular vectors.
    _, values, rotation = torch.linalg.svd(matrix @ basis, full_matrices=False)
    return values, rotation @ basis.t()


def gradient_sketches(
    model: nn.Module, groups: Sequence[Sequence[str]], losses: Losses, rank: int, seed: int
) -> dict[str, Tensor]:
    """Leading input directions of each group's gradient.

    Args:
        model: the model before conversion, in its training dtype; unchanged on return.
        groups: module paths; the members of a group share their input and get one set of directions.
        losses: runs the batches and yields the loss of each, with its autograd graph; called twice, and must use the
            same batches each time.
        rank: number of directions per group.
        seed: seed of the random test matrices.

    Returns:
        `(rank, in)` fp32 with orthonormal rows, on the CPU, keyed by the group's first member; experts that no token
        of the batches reached have no entry.

    Raises:
        ConfigurationError: no token of the batches reached a layer that is not an expert, or gradients are not finite.
        OutOfMemoryError: the disk for temporary files has no room for the sketches.
    """
    device = next(model.parameters()).device
    names = [name for group in groups for name in group]
    with Sums(device) as ranges:
        with Sums(device) as sums:
            with call_every_expert(model):
                observe(model, names, losses, _Sketch(rank, seed), sums)
            for group in groups:
                sketch = torch.stack([sums.at(name) for name in group]).sum(0)
                ranges.add(group[0], torch.linalg.qr(sketch).Q.t())  # transposed, so that it is contiguous in memory
        first = {name: group[0] for group in groups for name in group}

        def measure(x: Tensor, g: Tensor, name: str) -> Tensor:
            return g.t() @ (x @ ranges.at(first[name]).t().to(x))  # (m, T) @ ((T, n) @ (n, width))

        directions = {}
        with Sums(device) as sums:
            with call_every_expert(model):
                observe(model, names, losses, measure, sums)
            for group in groups:
                parts = torch.cat([sums.at(name) for name in group])
                if in_experts(model, group[0]) and not bool(parts.any()):
                    continue  # its gradient is zero, so it has no directions
                try:
                    _, _, rotation = torch.linalg.svd(parts, full_matrices=False)
                except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                    # NaN or infinity; a separate check would need another GPU synchronization.
                    raise _not_finite(group[0]) from error
                directions[group[0]] = (rotation[:rank] @ ranges.at(group[0])).contiguous().cpu()
    return directions


def _not_finite(name: str) -> ConfigurationError:
    return ConfigurationError(
        "the model's gradients are not finite before the first step",
        why=f"NaN or infinity in the gradient of {name}: its outputs overflow on the training data",
        fix="fetch the model again, or start from a checkpoint before its training diverged",
    )


class _Sketch:
    """Computes the sketch `X^T (G S)` of a module's gradient for one batch.

    S is random but the same for all batches of a module, so that the sum over batches is a sketch of the summed
    gradient. As S is as large as the sketch, it is not stored but drawn again for each batch.
    """

    def __init__(self, rank: int, seed: int) -> None:
        self._columns = _SKETCH_FACTOR * rank
        self._generator = torch.Generator().manual_seed(seed)
        self._begun: dict[str, Tensor] = {}  # the generator's state before the first draw of S

    def __call__(self, x: Tensor, g: Tensor, name: str) -> Tensor:
        generator = self._generator
        if name in self._begun:
            generator = torch.Generator().set_state(self._begun[name])
        else:
            self._begun[name] = generator.get_state()
        test = torch.randn(g.shape[1], min(self._columns, x.shape[1]), generator=generator).to(g)
        return x.t() @ (g @ test)  # (n, T) @ ((T, m) @ (m, width))
