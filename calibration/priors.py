"""Attention priors (SARDFQ, arXiv 2412.16553, "attention priors alignment"): made-up maps that attention shall follow.

What a class token attends in a photograph is a few blobs. So each image draws, for every head of the deeper half of the
layers, a map of one to five Gaussians, and the synthesis lowers the squared distance of the real map from it, deeper
layers counting more. Distances are in units of uniform attention (1 / patches), so that they do not depend on the
resolution. Where the view of an image is a part of it or turned, its priors are moved with the view.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from calibration.streams import uniform

_MOST: Final = 5  # Gaussians a map
_NARROWEST, _WIDEST = 0.1, 0.3  # standard deviation along an axis, of the map's side


def draw_priors(streams: list[torch.Generator], layers: int, heads: int, grid: tuple[int, int]) -> Tensor:
    """Random maps, `(N, layers, heads, rows, columns)` fp32 with a maximum of at most 1.

    Each is the maximum of its Gaussians, whose number, places and widths are drawn from the image's own stream.
    """
    draws = uniform(streams, layers, heads, _MOST, 5)
    counts = 1 + (draws[..., 0, 4] * _MOST).long()  # (N, L, H)
    spread = _NARROWEST + (_WIDEST - _NARROWEST) * draws[..., 2:4]
    rows = (torch.arange(grid[0]) + 0.5) / grid[0]
    columns = (torch.arange(grid[1]) + 0.5) / grid[1]
    down = ((rows - draws[..., 0:1]) / spread[..., 0:1]).square()  # (N, L, H, M, rows)
    across = ((columns - draws[..., 1:2]) / spread[..., 1:2]).square()
    blobs = torch.exp(-0.5 * (down.unsqueeze(-1) + across.unsqueeze(-2)))
    present = torch.arange(_MOST) < counts.unsqueeze(-1)
    return (blobs * present[..., None, None]).amax(-3)


def deeper_half(names: list[str]) -> dict[str, float]:
    """The later half of the layers with their weights, depth over number of layers."""
    return {name: (i + 1) / len(names) for i, name in enumerate(names) if i >= len(names) // 2}


def prior_distance(shares: Tensor, prior: Tensor) -> Tensor:
    """Mean squared distance over heads and patches, in units of uniform attention.

    Args:
        shares: of `attended`, `(N, H, P)` with sums of 1.
        prior: `(N, H, P)`, not negative; scaled here to sums of 1.

    Returns:
        `(N,)` fp32.
    """
    wanted = prior / prior.sum(-1, keepdim=True).clamp(min=1e-12)
    return ((shares - wanted) * shares.shape[-1]).square().flatten(1).mean(1)
