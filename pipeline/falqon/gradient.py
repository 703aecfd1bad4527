"""A from the loss's own gradient: the input directions along which the weights want to move first.

A frozen A fixes the subspace of every later update, so it should hold the directions that matter. Those are the leading
right singular vectors of dL/dW = G^T X. Neither dW nor all of X is ever stored: a few batches run backward through the
base model twice. The first pass sketches the range of dW^T as `X^T (G S)` with a thin random S; the second measures
dW on that range, `G^T (X Q)`, whose SVD picks the leading directions within it (Halko, Martinsson, Tropp 2011,
algorithms 4.1 and 5.1). Starting an adapter at the gradient is LoRA-GA's idea (arXiv 2407.05000); here A stays there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

Losses = Callable[[], Iterable[Tensor]]
_SKETCH_FACTOR = 3  # columns of the sketch for each direction wanted: there are no power iterations to sharpen it
Project = Callable[[Tensor, Tensor, str], Tensor]


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
        By first member: `(rank, in)` fp32 with orthonormal rows.
    """
    generator = torch.Generator().manual_seed(seed)
    tests: dict[str, Tensor] = {}

    def sketch(x: Tensor, g: Tensor, name: str) -> Tensor:
        if name not in tests:  # one S a module for all batches: the sketch is of the summed gradient
            width = min(_SKETCH_FACTOR * rank, x.shape[1])
            tests[name] = torch.randn(g.shape[1], width, generator=generator).to(g)
        return (x.t() @ (g @ tests[name])).float()  # (n, T) @ ((T, m) @ (m, width))

    ranges: dict[str, Tensor] = {}
    for group, parts in zip(groups, _observe(model, groups, losses, sketch), strict=True):
        ranges |= dict.fromkeys(group, torch.linalg.qr(torch.stack(parts).sum(0)).Q)

    def measure(x: Tensor, g: Tensor, name: str) -> Tensor:
        return (g.t() @ (x @ ranges[name].to(x))).float()  # (m, T) @ ((T, n) @ (n, width))

    directions = {}
    for group, parts in zip(groups, _observe(model, groups, losses, measure), strict=True):
        _, _, rotation = torch.linalg.svd(torch.cat(parts), full_matrices=False)
        directions[group[0]] = (rotation[:rank] @ ranges[group[0]].t()).contiguous()
    return directions


def _observe(model: nn.Module, groups: Sequence[Sequence[str]], losses: Losses, project: Project) -> list[list[Tensor]]:
    """For each member of each group, the sum over all batches of `project(X, G, name)`."""
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def on_forward(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1])

            def on_gradient(gradient: Tensor) -> None:
                part = project(x, gradient.reshape(-1, gradient.shape[-1]), name)
                sums[name] = sums[name] + part if name in sums else part

            output.register_hook(on_gradient)

        return on_forward

    handles = [model.get_submodule(n).register_forward_hook(watch(n)) for group in groups for n in group]
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    handles.append(embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_()))
    try:
        for loss in losses():
            loss.backward()
    finally:
        for handle in handles:
            handle.remove()
    return [[sums[name] for name in group] for group in groups]
