"""Losses that images are optimised by: on the attention of the frozen model, one value per image.

Every loss is a vector over images, so that a batch never couples its members and an image does not depend on which
others it was made with.

**Received attention**: how much each patch receives, from the class token where there is one, from all patches
otherwise. Masks, priors and the pruning of tokens, which treat patches unequally, all depend on it.

**Attention priors** (SARDFQ, arXiv 2412.16553, "attention priors alignment") are made-up maps that it should follow:
what a class token attends to in a photograph is a few blobs. So each image draws, for every head of the deeper half of
the layers, a map of one to five Gaussians, and the synthesis lowers the squared distance of the real map from it,
deeper layers counting more. Distances are in units of uniform attention (1 / patches), so that they do not depend on
the resolution. Where the view of an image is a part of it or rotated, its priors are moved with the view.

**MaskAQ** (arXiv 2606.04373) has two terms. The first maximises the differential entropy of the similarity among
patches, taken as Gaussian: rows of the head-mean logits are normalised, their cosines have a variance, and
`0.5 log(2 pi e variance)` is the entropy. The second lowers the difference between the float model's and the quantized
model's attention on the patches that receive most of the class token's attention: half of them at first, a tenth at
last, of which three in ten are left out at random in each step. The published method synthesises anew while its student
trains. Here images are made before there is a student, from the model alone, so the quantized side is each attention
with queries and keys rounded to a few bits: no second pass is needed, and what is lowered is the rounding error that
every student of these bits begins with.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from calibration.views import uniform
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.vision.structure import AttentionSite, VitStructure

_C1, _C2 = 0.01**2, 0.03**2  # SSIM's constants for maps in [0, 1]


def head_similarity(maps: Tensor, site: AttentionSite, *, absolute: bool = False) -> Tensor:
    """Inter-head dissimilarity of one attention, MimiQ's generation loss (arXiv 2407.20021, section 4).

    For each query patch, its H attention maps over the key patches are scaled to [0, 1]; every ordered pair of heads is
    compared by SSIM with global moments; the loss is the mean of `1 - SSIM^2` over queries and pairs, a head with
    itself included. The H x H covariances are one batched product: no tensor grows with H squared times the keys.

    Args:
        maps: attention logits before mask and softmax (or probabilities), `(N * windows, H, tokens, tokens)`. A factor
            on the logits makes no difference, since every map is scaled to [0, 1].
        site: tells prefix tokens, which are left out as queries and keys, and windows.
        absolute: `1 - |SSIM|` instead of the square.

    Returns:
        `(N,)` fp32, from 0 (all heads alike, up to a positive affine map) to `(H - 1) / H` (independent).
    """
    patches = maps[:, :, site.prefix_tokens :, site.prefix_tokens :].float()
    low = patches.amin(-1, keepdim=True)
    span = patches.amax(-1, keepdim=True) - low
    scaled = (patches - low) / (span + 1e-8)
    mean = scaled.mean(-1)  # (B, H, Q)
    centred = (scaled - mean.unsqueeze(-1)).transpose(1, 2)  # (B, Q, H, K)
    covariance = centred @ centred.transpose(-2, -1) / patches.shape[-1]  # (B, Q, H, K) @ (B, Q, K, H)
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    mean = mean.transpose(1, 2)  # (B, Q, H)
    products, squares = mean.unsqueeze(-1) * mean.unsqueeze(-2), mean.square()
    top = (2 * products + _C1) * (2 * covariance + _C2)
    luminance = squares.unsqueeze(-1) + squares.unsqueeze(-2) + _C1
    contrast = variance.unsqueeze(-1) + variance.unsqueeze(-2) + _C2
    similarity = top / (luminance * contrast)
    each = 1 - (similarity.abs() if absolute else similarity.square())
    return each.flatten(1).mean(1).view(-1, site.windows).mean(1)


def total_variation(images: Tensor) -> Tensor:
    """Norms of the differences to the right, lower and both diagonal neighbours, `(N,)`.

    The published code takes each norm over a whole batch, so that its weight falls with the batch's root; here it
    is an image's own.
    """
    right = images[..., :, 1:] - images[..., :, :-1]
    down = images[..., 1:, :] - images[..., :-1, :]
    falling = images[..., 1:, 1:] - images[..., :-1, :-1]
    rising = images[..., 1:, :-1] - images[..., :-1, 1:]
    straight, slanted = (right, down), (falling, rising)
    norms = [d.flatten(1).norm(dim=1) for d in straight] + [d.flatten(1).norm(dim=1) / math.sqrt(2) for d in slanted]
    return torch.stack(norms).sum(0)


def class_prior(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the model's logits `(N, C)` against the labels `(N,)`, `(N,)` fp32."""
    return functional.cross_entropy(logits.float(), labels, reduction="none")


def patch_entropy(outputs: Tensor, site: AttentionSite, bandwidth: float = 0.05) -> Tensor:
    """PSAQ-ViT's loss (arXiv 2203.02250, section 3.2): negative differential entropy of the similarity among patches.

    `(N,)` fp32.

    Args:
        outputs: attn.v `(N * windows, H, tokens, d)`, averaged over heads.
        site: tells prefix tokens and windows.
        bandwidth: of the kernel density estimate on 10 points of [-1, 1], in units of cosine.
    """
    tokens = functional.normalize(outputs[:, :, site.prefix_tokens :].float().mean(1), dim=-1)
    cosines = (tokens @ tokens.transpose(-2, -1)).flatten(1)  # (B, P, d) @ (B, d, P)
    points = torch.linspace(-1, 1, 10, device=cosines.device)
    kernel = torch.exp(-0.5 * ((points[:, None] - cosines[:, None, :]) / bandwidth).square())
    density = kernel.mean(-1) / (bandwidth * math.sqrt(2 * math.pi))
    entropy = -(density * torch.log(density + 1e-8)).sum(1) * (2 / 9)
    return -entropy.view(-1, site.windows).mean(1)


_MOST: Final = 5  # Gaussians in a map
_NARROWEST, _WIDEST = 0.1, 0.3  # standard deviation along an axis, of the map's side


def summary_query(queries: Tensor, site: AttentionSite) -> Tensor:
    """The query `(N, H, 1, d)` that stands for the whole picture: the class token's, or the mean of all patches'.

    The first of the prefix tokens is taken for the class token. Rows of maps `(N, H, tokens, keys)` are queries too.
    """
    return queries[:, :, :1] if site.prefix_tokens else queries.mean(2, keepdim=True)


def received_attention(probabilities: Tensor, site: AttentionSite) -> Tensor:
    """The share of each patch in the attention that patches receive, `(N, H, patches)` fp32 with sums of 1."""
    among = summary_query(probabilities, site)[:, :, 0, site.prefix_tokens :].float()
    return among / among.sum(-1, keepdim=True).clamp(min=1e-12)


def global_sites(structure: VitStructure, wish: str) -> dict[str, AttentionSite]:
    """The attentions of a plain transformer by name, in their order: global, over all patches, equally many heads.

    `wish` is what needs them, for the message.

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
    """Mean squared distance of `received_attention` over heads and patches in units of uniform attention, `(N,)` fp32.

    The prior `(N, H, P)`, not negative, is scaled here to sums of 1.
    """
    wanted = prior / prior.sum(-1, keepdim=True).clamp(min=1e-12)
    return ((shares - wanted) * shares.shape[-1]).square().flatten(1).mean(1)


_FIRST_SHARE: Final = 0.5  # of the patches, published
_LAST_SHARE: Final = 0.1
_DROPPED: Final = 0.3


def similarity_spread(logits: Tensor, site: AttentionSite) -> Tensor:
    """Negative Gaussian entropy of the cosines among patches' attention rows, `(N,)` fp32; prefix tokens are left out.

    A positive factor on the logits `(N, H, tokens, tokens)` makes no difference.
    """
    with torch.autocast(logits.device.type, enabled=False):
        rows = functional.normalize(logits[:, :, site.prefix_tokens :, site.prefix_tokens :].float().mean(1), dim=-1)
        cosines = (rows @ rows.transpose(-2, -1)).flatten(1)  # (N, P, P) @ (N, P, P)
        return -0.5 * (math.log(2 * math.pi * math.e) + torch.log(cosines.var(1, unbiased=False) + 1e-8))


def rounded(values: Tensor, bits: int) -> Tensor:
    """`values` `(N, H, T, d)` on a symmetric grid of `bits`, one step per image and head; gradients pass unchanged."""
    step: Tensor = values.detach().abs().amax((-2, -1), keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
    return values + ((values / step).round() * step - values).detach()


def query_logits(q: Tensor, k: Tensor, site: AttentionSite, bits: int) -> tuple[Tensor, Tensor]:
    """Logits of one attention's `summary_query`, in float and with queries and keys rounded to `bits`.

    Of `q` and `k` `(N, H, tokens, d)`, not scaled; two `(N, patches)` fp32: q.k of the patches, the mean over heads.
    """
    found = []
    with torch.autocast(q.device.type, enabled=False):
        for queries, keys in ((q.float(), k.float()), (rounded(q.float(), bits), rounded(k.float(), bits))):
            logits = summary_query(queries, site) @ keys[:, :, site.prefix_tokens :].transpose(-2, -1)  # (N, H, 1, P)
            found.append(logits[:, :, 0].mean(1))
    return found[0], found[1]


def informative(logits: Tensor, progress: float, draws: Tensor) -> Tensor:
    """The patches that count, `(N, P)` of zeros and ones.

    Args:
        logits: `(N, P)`, mean of `query_logits` over layers.
        progress: from 0 at the first step to 1 after the last.
        draws: `(N, P)`, uniform: of the chosen patches, those with the lowest draws are left out.
    """
    share = _FIRST_SHARE + (_LAST_SHARE - _FIRST_SHARE) * progress
    count = max(1, int(logits.shape[1] * share + 1e-6))  # a tenth of 100 is 10, also where 0.1 is a little less
    kept = max(1, round(count * (1 - _DROPPED)))
    best = logits.topk(count, dim=1).indices
    lucky = draws.gather(1, best).topk(kept, dim=1).indices
    return torch.zeros_like(logits).scatter(1, best.gather(1, lucky), 1.0)


def masked_difference(logits: list[tuple[Tensor, Tensor]], progress: float, draws: Tensor) -> Tensor:
    """Mean over layers of |float - rounded| on the `informative` patches, `(N,)` fp32, from `query_logits` of each."""
    mask = informative(torch.stack([a for a, _ in logits]).mean(0).detach(), progress, draws)
    each = torch.stack([(a - b).abs() for a, b in logits]).mean(0)  # (N, P)
    return (each * mask).sum(1) / mask.sum(1)
