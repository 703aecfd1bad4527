"""What the student is taught: the teacher's answers, and the structure of each head's output.

`distillation` is the temperature-softened KL divergence (arXiv 1503.02531). `head_structure` is MimiQ's head-wise
structural attention distillation (arXiv 2407.20021, section 4): for each head and channel of attn.v, the
contrast-and-structure part of SSIM over the patch tokens. A constant shift costs nothing, a wrong pattern does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_C2 = 0.03**2  # SSIM's second constant


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`T^2 KL(softmax(teacher/T) || softmax(student/T))`, mean over images; both `(N, C)`, fp32 result."""
    soft = functional.log_softmax(student.float() / temperature, dim=1)
    target = functional.log_softmax(teacher.float() / temperature, dim=1)
    return functional.kl_div(soft, target, reduction="batchmean", log_target=True) * temperature**2


def feature_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """`1 - cosine`, mean over images, for backbones that give features `(N, C)` instead of logits."""
    return (1 - functional.cosine_similarity(student.float(), teacher.float(), dim=1)).mean()


def head_structure(student: Tensor, teacher: Tensor, prefix_tokens: int) -> Tensor:
    """`1 - mean S` with `S = (2 cov + C2) / (var_t + var_s + C2)` over patch tokens.

    Args:
        student: attn.v `(B, H, N, d)`; B counts windows too.
        teacher: the same of the teacher; gets no gradient.
        prefix_tokens: leading tokens that are not patches, left out.

    Returns:
        fp32 scalar: 0 for equal or shifted maps, about 1 for independent, about 2 for negated ones.
    """
    s = student[:, :, prefix_tokens:].float()
    t = teacher.detach()[:, :, prefix_tokens:].float()
    s, t = s - s.mean(2, keepdim=True), t - t.mean(2, keepdim=True)
    covariance = (s * t).mean(2)
    similarity = (2 * covariance + _C2) / (s.square().mean(2) + t.square().mean(2) + _C2)
    return 1 - torch.mean(similarity)
