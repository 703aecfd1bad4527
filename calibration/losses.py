"""Losses for the synthesis of images, mostly on the attention of the frozen model.

Every loss is a vector with one value per image, so that an image does not depend on the others in its batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from fp8pipe.models.vision.structure import AttentionSite

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
    """Cross-entropy of the model's logits `(N, C)` with the labels `(N,)`; `(N,)` fp32."""
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
