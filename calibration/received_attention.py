"""How much attention each patch receives: from the class token where there is one, from all patches otherwise.

Masks, priors and the pruning of tokens, which treat patches unequally, all depend on this. Attention priors (SARDFQ,
arXiv 2412.16553, "attention priors alignment") are made-up maps that it should follow: what a class token attends to in
a photograph is a few blobs. So each image draws, for every head of the deeper half of the layers, a map of one to five
Gaussians, and the synthesis lowers the squared distance of the real map from it, deeper layers counting more. Distances
are in units of uniform attention (1 / patches), so that they do not depend on the resolution. Where the view of an
image is a part of it or rotated, its priors are moved with the view.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from calibration.streams import uniform
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.vision.structure import AttentionSite, VitStructure

_MOST: Final = 5  # Gaussians in a map
_NARROWEST, _WIDEST = 0.1, 0.3  # standard deviation along an axis, of the map's side


def summary_query(queries: Tensor, site: AttentionSite) -> Tensor:
    """The query that stands for the whole picture: the class token's, or the mean of all patches'.

    Args:
        queries: `(N, H, tokens, d)`; or maps `(N, H, tokens, keys)`, whose rows are queries too.
        site: tells whether there are prefix tokens; the first of them is taken for the class token.

    Returns:
        `(N, H, 1, d)`, of the same dtype.
    """
    return queries[:, :, :1] if site.prefix_tokens else queries.mean(2, keepdim=True)


def received_attention(probabilities: Tensor, site: AttentionSite) -> Tensor:
    """The share of each patch in the attention that patches receive, `(N, H, patches)` fp32 with sums of 1.

    Args:
        probabilities: `(N, H, tokens, tokens)`.
        site: tells prefix tokens.
    """
    among = summary_query(probabilities, site)[:, :, 0, site.prefix_tokens :].float()
    return among / among.sum(-1, keepdim=True).clamp(min=1e-12)


def global_sites(structure: VitStructure, wish: str) -> dict[str, AttentionSite]:
    """The attentions of a plain transformer by name, in their order: global, over all patches, equally many heads.

    Args:
        structure: of the model.
        wish: what needs them, for the message.

    Raises:
        ConfigurationError: there is none, or one has windows, merged patches, or other heads.
    """
    sites = [site for site in structure.attentions if not site.pools]
    area = structure.patch_grid[0] * structure.patch_grid[1]
    odd = [s for s in sites if s.windows > 1 or s.tokens - s.prefix_tokens != area or s.heads != sites[0].heads]
    if sites and not odd:
        return {site.name: site for site in sites}
    raise ConfigurationError(
        f"{wish} need a plain vision transformer",
        why=f"the attention {odd[0].name} has windows or merged patches" if odd else "the model has no attention",
        fix=f"leave {wish} off for this model",
    )


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
    """Mean squared distance over heads and patches in units of uniform attention, `(N,)` fp32.

    Args:
        shares: of `received_attention`, `(N, H, P)` with sums of 1.
        prior: `(N, H, P)`, not negative; scaled here to sums of 1.
    """
    wanted = prior / prior.sum(-1, keepdim=True).clamp(min=1e-12)
    return ((shares - wanted) * shares.shape[-1]).square().flatten(1).mean(1)
