"""MaskAQ's losses (arXiv 2606.04373): patches that differ, few informative ones on which rounding changes little.

Two terms. The first maximises the differential entropy of the similarity among patches, taken as Gaussian: rows of the
head-mean logits are normalised, their cosines have a variance, and `0.5 log(2 pi e variance)` is the entropy. The
second lowers the difference between the float model's and the quantized model's attention on the patches that receive
most of the class token's attention: half of them at first, a tenth at last, of which three in ten are left out at
random in each step.

The published method synthesises anew while its student trains. Here images are made before there is a student, from the
model alone, so the quantized side is each attention with queries and keys rounded to a few bits: no second pass is
needed, and what is lowered is the rounding error that every student of these bits begins with.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from calibration.received_attention import summary_query
from fp8pipe.models.vision.structure import AttentionSite

_FIRST_SHARE: Final = 0.5  # of the patches, published
_LAST_SHARE: Final = 0.1
_DROPPED: Final = 0.3


def similarity_spread(logits: Tensor, site: AttentionSite) -> Tensor:
    """Negative Gaussian entropy of the cosines among patches' attention rows, `(N,)` fp32.

    Args:
        logits: `(N, H, tokens, tokens)`, a positive factor on them makes no difference.
        site: tells prefix tokens, which are left out.
    """
    with torch.autocast("cpu", enabled=False):
        rows = functional.normalize(logits[:, :, site.prefix_tokens :, site.prefix_tokens :].float().mean(1), dim=-1)
        cosines = (rows @ rows.transpose(-2, -1)).flatten(1)  # (N, P, P) @ (N, P, P)
        return -0.5 * (math.log(2 * math.pi * math.e) + torch.log(cosines.var(1, unbiased=False) + 1e-8))


def rounded(values: Tensor, bits: int) -> Tensor:
    """`values` `(N, H, T, d)` on a symmetric grid of `bits`, one step per image and head; gradients pass unchanged."""
    step: Tensor = values.detach().abs().amax((-2, -1), keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
    return values + ((values / step).round() * step - values).detach()


def query_logits(q: Tensor, k: Tensor, site: AttentionSite, bits: int) -> tuple[Tensor, Tensor]:
    """Logits of one attention's `summary_query`, in float and rounded.

    Args:
        q: `(N, H, tokens, d)`, not scaled.
        k: `(N, H, tokens, d)`.
        site: tells prefix tokens.
        bits: of the rounded queries and keys.

    Returns:
        Two `(N, patches)` fp32: q.k of the patches, the mean over heads.
    """
    found = []
    with torch.autocast("cpu", enabled=False):
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
    """Mean over layers of |float - rounded| on the informative patches, `(N,)` fp32.

    Args:
        logits: of `query_logits`, a pair per layer.
        progress: from 0 to 1.
        draws: `(N, P)` uniform, from each image's own stream.
    """
    mask = informative(torch.stack([a for a, _ in logits]).mean(0).detach(), progress, draws)
    each = torch.stack([(a - b).abs() for a, b in logits]).mean(0)  # (N, P)
    return (each * mask).sum(1) / mask.sum(1)
