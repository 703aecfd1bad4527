"""Rotations inside each head, and centring: what every attention allows without changing what it computes.

* Queries and keys of a head may be turned by one orthogonal matrix: `(qR)(kR)^T = qk^T`.
* Values may be turned if the projection behind them is turned back: `(p vR)(R^T W) = p v W`.
* A constant added to all keys adds the same to every logit of a query, which softmax does not see (the smoothing of
  SageAttention, arXiv 2410.02367). So keys may lose their mean.
* Probabilities add up to one, so a constant in the values passes unchanged: it moves into the projection's bias. What
  is left has no mean, and probabilities that round to a sum other than one then cost far less.

Turned channels have alike magnitudes and nearly normal values (the idea of QuaRot, arXiv 2404.00456), and centred ones
waste no codes: both are what a grid with one scale for the whole tensor wants.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pipeline.vit.transforms.wiring import AttentionWiring, Rows, Wiring


def random_rotation(size: int, generator: torch.Generator) -> Tensor:
    """A uniformly random orthogonal matrix `(size, size)`, float64."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


@torch.no_grad()
def rotate_heads(model: nn.Module, wiring: Wiring, generator: torch.Generator) -> int:
    """Turn queries with keys, and values with the projection, head by head; in place.

    Returns:
        How many products were conditioned, two an attention where its linears are known.
    """
    done = 0
    for attention in wiring.attentions:
        site = attention.site
        if attention.q is not None and attention.k is not None:
            for head in range(site.heads):
                turn = random_rotation(site.head_dim, generator)
                _turn_rows(model, attention.q, head, turn)
                _turn_rows(model, attention.k, head, turn)
            done += 1
        if attention.v is not None and attention.projection is not None:
            width = attention.v.width // site.heads  # values may be wider than queries
            weight = model.get_submodule(attention.projection).get_parameter("weight")
            for head in range(site.heads):
                turn = random_rotation(width, generator)
                _turn_rows(model, attention.v, head, turn)
                columns = slice(head * width, (head + 1) * width)
                weight[:, columns] = (weight[:, columns].double() @ turn.T).to(weight.dtype)
            done += 1
    return done


def _turn_rows(model: nn.Module, rows: Rows, head: int, turn: Tensor) -> None:
    size = turn.shape[0]
    chosen = slice(rows.start + head * size, rows.start + (head + 1) * size)
    for parameter in model.get_submodule(rows.linear).parameters(recurse=False):
        parameter[chosen] = (turn @ parameter[chosen].double()).to(parameter.dtype)


@torch.no_grad()
def centre_keys(model: nn.Module, attention: AttentionWiring, mean: Tensor) -> bool:
    """Take the mean `(H * d,)` of the keys out of their bias, in place; whether that was possible."""
    bias = None if attention.k is None else _bias(model, attention.k.linear)
    if attention.k is None or bias is None:
        return False
    bias[attention.k.slice] -= mean
    return True


@torch.no_grad()
def centre_values(model: nn.Module, attention: AttentionWiring, mean: Tensor) -> bool:
    """Move the mean `(H * d,)` of the values into the projection's bias, in place; whether that was possible."""
    if attention.v is None or attention.projection is None or attention.site.pools:
        return False
    bias, after = _bias(model, attention.v.linear), _bias(model, attention.projection)
    if bias is None or after is None:
        return False
    weight = model.get_submodule(attention.projection).get_parameter("weight")
    bias[attention.v.slice] -= mean
    after.add_((weight.double() @ mean.double()).to(after.dtype))
    return True


def _bias(model: nn.Module, linear: str) -> nn.Parameter | None:
    return getattr(model.get_submodule(linear), "bias", None)
