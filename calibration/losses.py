"""Losses for the synthesis of images, mostly on the attention of the frozen model.

Every loss is a vector with one value per image, so that an image does not depend on the others in its batch.

**Received attention** is how much attention each patch receives, from the class token if there is one, otherwise from
all patches. Masks, priors and token pruning, which treat patches differently, all use it.

**Attention priors** (SARDFQ, arXiv 2412.16553, "attention priors alignment") are random target maps for the received
attention: in a photograph, a class token attends to a few blobs. So for each image and every head of the deeper half of
the layers, a map of one to five Gaussians is drawn, and the loss is the squared distance of the actual map from it,
with larger weights for deeper layers. Distances are in units of uniform attention (1 / patches), so that they do not
depend on the resolution. If a view shows a part of an image, or rotates it, its priors are transformed in the same way.

**MaskAQ** (arXiv 2606.04373) has two terms. The first maximises the differential entropy of the similarity between
patches, assumed to be Gaussian: rows of the head-mean logits are normalised, and the entropy of their cosines is
`0.5 log(2 pi e variance)`. The second minimises the difference between the float model's and the quantized model's
attention on the patches that receive most of the class token's attention: half of all patches at the first step, a
tenth at the last, with three in ten of them dropped at random in each step. The published method synthesises new images
while its student trains. Here images are made before there is a student, so the quantized side is each attention with
queries and keys rounded to a few bits: no second forward pass is needed, and the loss is the rounding error that every
student with this bit width starts with.
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

    For each query patch, its H attention maps over the key patches are scaled to [0, 1]; every ordered pair of heads,
    including a head with itself, is compared by SSIM with global moments; the loss is the mean of `1 - SSIM^2` over
    queries and pairs. One batched GEMM computes the H x H covariances, so no tensor has a size of H^2 times the keys.

    Args:
        maps: attention logits before mask and softmax (or probabilities), `(N * windows, H, tokens, tokens)`. A factor
            on the logits makes no difference, since every map is scaled to [0, 1].
        site: the attention's prefix tokens, which are excluded as queries and keys, and its windows.
        absolute: use `1 - |SSIM|` instead of `1 - SSIM^2`.

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
    """Total variation of images `(N, 3, H, W)`: the norms of the differences of neighbouring pixels, summed; `(N,)`.

    Neighbours are to the right, below and on both diagonals. The published code takes each norm over the whole batch,
    so that its weight falls with the square root of the batch size; here the norms are per image.
    """
    right = images[..., :, 1:] - images[..., :, :-1]
    down = images[..., 1:, :] - images[..., :-1, :]
    falling = images[..., 1:, 1:] - images[..., :-1, :-1]
    rising = images[..., 1:, :-1] - images[..., :-1, 1:]
    straight, slanted = (right, down), (falling, rising)
    norms = [d.flatten(1).norm(dim=1) for d in straight] + [d.flatten(1).norm(dim=1) / math.sqrt(2) for d in slanted]
    return torch.stack(norms).sum(0)


def class_prior(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the model's logits `(N, C)` with the labels `(N,)` or soft targets `(N, C)`, `(N,)` fp32."""
    return functional.cross_entropy(logits.float(), labels, reduction="none")


def patch_entropy(outputs: Tensor, site: AttentionSite, bandwidth: float = 0.05) -> Tensor:
    """PSAQ-ViT's loss (arXiv 2203.02250, section 3.2): negative differential entropy of the similarity between patches.

    Args:
        outputs: attn.v `(N * windows, H, tokens, d)`, which is averaged over heads here.
        site: the attention's prefix tokens and windows.
        bandwidth: bandwidth of the kernel density estimate at 10 points in [-1, 1], in units of the cosine.

    Returns:
        `(N,)` fp32.
    """
    tokens = functional.normalize(outputs[:, :, site.prefix_tokens :].float().mean(1), dim=-1)
    cosines = (tokens @ tokens.transpose(-2, -1)).flatten(1)  # (B, P, d) @ (B, d, P)
    points = torch.linspace(-1, 1, 10, device=cosines.device)
    kernel = torch.exp(-0.5 * ((points[:, None] - cosines[:, None, :]) / bandwidth).square())
    density = kernel.mean(-1) / (bandwidth * math.sqrt(2 * math.pi))
    entropy = -(density * torch.log(density + 1e-8)).sum(1) * (2 / 9)
    return -entropy.view(-1, site.windows).mean(1)


_MOST: Final = 5  # maximum number of Gaussians in a map
_NARROWEST, _WIDEST = 0.1, 0.3  # standard deviation along an axis, relative to the map's side


def summary_query(queries: Tensor, site: AttentionSite) -> Tensor:
    """The query `(N, H, 1, d)` that represents the whole image: the class token's, or the mean over all patches.

    The first prefix token is taken as the class token. `queries` may also be attention maps `(N, H, tokens, keys)`.
    """
    return queries[:, :, :1] if site.prefix_tokens else queries.mean(2, keepdim=True)


def received_attention(probabilities: Tensor, site: AttentionSite) -> Tensor:
    """The attention that each patch receives, relative to all patches: `(N, H, patches)` fp32 that sums to 1."""
    among = summary_query(probabilities, site)[:, :, 0, site.prefix_tokens :].float()
    return among / among.sum(-1, keepdim=True).clamp(min=1e-12)


def global_sites(structure: VitStructure, wish: str) -> dict[str, AttentionSite]:
    """The attentions of a plain vision transformer, by name and in order, except pooling ones.

    Each attends over all patches, and all have the same number of heads. `wish` names the option that needs such
    attentions, for the error message.

    Raises:
        ConfigurationError: there are none, or one has windows, merged patches, or another number of heads.
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
    """Draw attention priors: random maps `(N, layers, heads, rows, columns)`, fp32 in [0, 1], for a `grid` of patches.

    Each map is the elementwise maximum of one to five Gaussians, whose number, positions and widths are drawn from the
    image's own stream.
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
    """The deeper half of the layers, by name, with their loss weights: depth / number of layers."""
    return {name: (i + 1) / len(names) for i, name in enumerate(names) if i >= len(names) // 2}


def prior_distance(shares: Tensor, prior: Tensor) -> Tensor:
    """Mean squared distance of `received_attention` from a prior, in units of uniform attention, `(N,)` fp32.

    The mean is over heads and patches. Both arguments are `(N, H, P)`; the prior, which must not be negative, is
    normalized here to a sum of 1.
    """
    wanted = prior / prior.sum(-1, keepdim=True).clamp(min=1e-12)
    return ((shares - wanted) * shares.shape[-1]).square().flatten(1).mean(1)


# MaskAQ's mask, as published: shares of the patches that it selects at the first and last step, and the share of the
# selected patches that is dropped at random.
_FIRST_SHARE: Final = 0.5
_LAST_SHARE: Final = 0.1
_DROPPED: Final = 0.3


def similarity_spread(logits: Tensor, site: AttentionSite) -> Tensor:
    """Negative entropy of the cosines between the patches' rows of head-mean logits, assumed Gaussian, `(N,)` fp32.

    `logits` are `(N, H, tokens, tokens)`, of which prefix tokens are ignored; a positive factor on them makes no
    difference.
    """
    with torch.autocast(logits.device.type, enabled=False):
        rows = functional.normalize(logits[:, :, site.prefix_tokens :, site.prefix_tokens :].float().mean(1), dim=-1)
        cosines = (rows @ rows.transpose(-2, -1)).flatten(1)  # (N, P, P) @ (N, P, P)
        return -0.5 * (math.log(2 * math.pi * math.e) + torch.log(cosines.var(1, unbiased=False) + 1e-8))


def rounded(values: Tensor, bits: int) -> Tensor:
    """Fake-quantize `values` `(N, H, T, d)` to a symmetric grid, with one scale per image and head.

    Gradients pass through the rounding unchanged (straight-through estimator).
    """
    step: Tensor = values.detach().abs().amax((-2, -1), keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
    return values + ((values / step).round() * step - values).detach()


def query_logits(q: Tensor, k: Tensor, site: AttentionSite, bits: int) -> tuple[Tensor, Tensor]:
    """Logits of one attention's `summary_query`, in float and with fake-quantized queries and keys.

    Args:
        q: queries `(N, H, tokens, d)`, not scaled.
        k: keys, same shape.
        site: the attention's prefix tokens.
        bits: bit width of the rounded queries and keys.

    Returns:
        Two tensors `(N, patches)`, fp32: the products q.k with each patch, averaged over heads; in float, and with
        rounded queries and keys.
    """
    found = []
    with torch.autocast(q.device.type, enabled=False):
        for queries, keys in ((q.float(), k.float()), (rounded(q.float(), bits), rounded(k.float(), bits))):
            logits = summary_query(queries, site) @ keys[:, :, site.prefix_tokens :].transpose(-2, -1)  # (N, H, 1, P)
            found.append(logits[:, :, 0].mean(1))
    return found[0], found[1]


def informative(logits: Tensor, progress: float, draws: Tensor) -> Tensor:
    """MaskAQ's mask of the patches that receive most attention, `(N, P)`, of zeros and ones.

    Args:
        logits: `(N, P)`, mean of the float `query_logits` over layers.
        progress: from 0 at the first step to 1 after the last.
        draws: `(N, P)`, uniform random numbers; the selected patches with the lowest numbers are dropped.
    """
    share = _FIRST_SHARE + (_LAST_SHARE - _FIRST_SHARE) * progress
    count = max(1, int(logits.shape[1] * share + 1e-6))  # so that a tenth of 100 is 10 despite floating-point error
    kept = max(1, round(count * (1 - _DROPPED)))
    best = logits.topk(count, dim=1).indices
    lucky = draws.gather(1, best).topk(kept, dim=1).indices
    return torch.zeros_like(logits).scatter(1, best.gather(1, lucky), 1.0)


def masked_difference(logits: list[tuple[Tensor, Tensor]], progress: float, draws: Tensor) -> Tensor:
    """MaskAQ's second loss: the mean of |float - rounded| logits over layers and `informative` patches, `(N,)` fp32.

    `logits` are the `query_logits` of each layer; see `informative` for the other arguments.
    """
    mask = informative(torch.stack([a for a, _ in logits]).mean(0).detach(), progress, draws)
    each = torch.stack([(a - b).abs() for a, b in logits]).mean(0)  # (N, P)
    return (each * mask).sum(1) / mask.sum(1)
