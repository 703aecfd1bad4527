"""A from the loss's own gradient: the input directions along which the weights want to move first.

A frozen A fixes the subspace of every later update, so it should hold the directions that matter. Those are the leading
right singular vectors of dL/dW = G^T X. Neither dW nor all of X is ever stored: a few batches are run backward through
the base model, and each layer accumulates the sketch `X^T (G S)` with a thin random S, whose range is that of
dW^T (Halko, Martinsson, Tropp 2011, section 4). The idea of starting an adapter at the gradient is LoRA-GA's
(arXiv 2407.05000); here A stays where it starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

# Row norm of A relative to the mean row norm that the error's SVD would give: keeps one learning rate for both.
Loss = Callable[[], Iterable[Tensor]]
_SKETCH_FACTOR = 3  # columns of the sketch for each row of A: one pass, so no power iterations to sharpen it


def gradient_sketches(
    model: nn.Module, groups: list[list[str]], losses: Loss, rank: int, seed: int
) -> dict[str, Tensor]:
    """Leading input directions of each group's gradient.

    Args:
        model: unconverted, in its training dtype; left as it was found.
        groups: module paths; the members of a group share their input and get one set of directions.
        losses: runs the batches, yielding each one's loss with gradient.
        rank: directions a group.
        seed: of the random test matrices.

    Returns:
        By first member: `(rank, in)` fp32 with orthonormal rows.
    """
    generator = torch.Generator().manual_seed(seed)
    sketches: dict[str, Tensor] = {}
    handles = []
    for group in groups:
        for name in group:
            module = model.get_submodule(name)
            handles.append(module.register_forward_hook(_sketching(sketches, group[0], rank, generator)))
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    handles.append(embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_()))
    try:
        for loss in losses():
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return {name: _leading_rows(sketch, rank) for name, sketch in sketches.items()}


def _sketching(
    sketches: dict[str, Tensor], key: str, rank: int, generator: torch.Generator
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    tests: list[Tensor] = []  # one S for all batches of this module: the sketch is of the summed gradient

    def on_forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0].detach().reshape(-1, args[0].shape[-1])
        width = min(_SKETCH_FACTOR * rank, x.shape[1])

        def on_gradient(gradient: Tensor) -> None:
            flat = gradient.reshape(-1, gradient.shape[-1])
            if not tests:
                tests.append(torch.randn(flat.shape[1], width, generator=generator).to(flat))
            projected = (x.t() @ (flat @ tests[0])).float()  # (n, T) @ ((T, m) @ (m, width))
            if key in sketches:
                sketches[key] += projected
            else:
                sketches[key] = projected

        output.register_hook(on_gradient)

    return on_forward


def _leading_rows(sketch: Tensor, rank: int) -> Tensor:
    left, _, _ = torch.linalg.svd(sketch.double(), full_matrices=False)
    return left[:, :rank].t().float().contiguous()
