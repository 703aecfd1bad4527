"""Rotations inside each head: what every attention allows without changing what it computes.

* Queries and keys of a head may be rotated by one orthogonal matrix: `(qR)(kR)^T = qk^T`.
* Values may be rotated if the projection behind them is rotated back: `(p vR)(R^T W) = p v W`.

Rotated channels have alike magnitudes and nearly normal values (the idea of QuaRot, arXiv 2404.00456), which is what a
grid with one scale per tensor wants.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.vit.transforms.wiring import Rows, Wiring


def random_rotation(size: int, generator: torch.Generator) -> Tensor:
    """A uniformly random orthogonal matrix `(size, size)`, float64."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    rotation: Tensor = q * r.diagonal().sign()
    return rotation


@torch.no_grad()
def rotate_heads(model: nn.Module, wiring: Wiring, generator: torch.Generator) -> int:
    """Rotate queries with keys, and values with the projection, head by head; in place.

    Returns:
        How many products were rotated, two per attention where its linears are known.
    """
    done = 0
    for attention in wiring.attentions:
        site = attention.site
        if attention.q is not None and attention.k is not None:
            for head in range(site.heads):
                rotation = random_rotation(site.head_dim, generator)
                _rotate_rows(model, attention.q, head, rotation)
                _rotate_rows(model, attention.k, head, rotation)
            done += 1
        if attention.v is not None and attention.projection is not None:
            width = attention.v.width // site.heads  # values may be wider than queries
            weight = model.get_submodule(attention.projection).get_parameter("weight")
            for head in range(site.heads):
                rotation = random_rotation(width, generator)
                _rotate_rows(model, attention.v, head, rotation)
                columns = slice(head * width, (head + 1) * width)
                weight[:, columns] = (weight[:, columns].double() @ rotation.T).to(weight.dtype)
            done += 1
    return done


def _rotate_rows(model: nn.Module, rows: Rows, head: int, rotation: Tensor) -> None:
    size = rotation.shape[0]
    chosen = slice(rows.start + head * size, rows.start + (head + 1) * size)
    for parameter in model.get_submodule(rows.linear).parameters(recurse=False):
        parameter[chosen] = (rotation @ parameter[chosen].double()).to(parameter.dtype)
