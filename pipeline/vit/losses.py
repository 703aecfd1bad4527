"""The losses of distillation, each between a student's tensors and those of its teacher.

The outputs of the models are compared by their kind (`output_distance`): `distillation` (classes),
`label_distillation` (labels), `value_distance` (regression) or `feature_distance` (backbones). Inside the models,
`head_structure` compares the outputs of attention heads, and `block_distance` the residual stream after each block.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from fp8pipe.models.vision.answers import Activation, ranks

_C2: Final = 0.03**2  # the second constant of SSIM, which stabilizes the division


def distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`T^2 KL(softmax(teacher/T) || softmax(student/T))`, mean over images: the loss for classes.

    Args:
        student: logits `(N, C)`.
        teacher: logits `(N, C)`.
        temperature: T.

    Returns:
        An fp32 scalar.
    """
    soft = functional.log_softmax(student.float() / temperature, dim=1)
    target = functional.log_softmax(teacher.float() / temperature, dim=1)
    return functional.kl_div(soft, target, reduction="batchmean", log_target=True) * temperature**2


def label_distillation(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """`distillation` for independent labels: T^2 times the KL divergence of their Bernoulli distributions.

    The divergence is summed over labels and averaged over images.
    """
    s, t = student.float() / temperature, teacher.float() / temperature
    log_t, log_not_t = functional.logsigmoid(t), functional.logsigmoid(-t)
    divergence = log_t.exp() * (log_t - functional.logsigmoid(s))
    divergence = divergence + log_not_t.exp() * (log_not_t - functional.logsigmoid(-s))
    return divergence.sum(1).mean() * temperature**2


def value_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The loss for regression outputs `(N, C)`: mean squared error relative to the teacher's variance over images.

    For a single image, which has no variance, it is relative to the teacher's mean square.
    """
    s, t = student.float(), teacher.float()
    varying = t - t.mean(0) if len(t) > 1 else t
    return (s - t).square().mean() / varying.square().mean().clamp(min=1e-12)


def feature_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The loss for backbones, whose outputs are features `(N, C)`: `1 - cosine similarity`, mean over images."""
    return (1 - functional.cosine_similarity(student.float(), teacher.float(), dim=1)).mean()


def output_distance(
    student: Tensor, teacher: Tensor, activation: Activation, is_backbone: bool, temperature: float
) -> Tensor:
    """The loss between the models' outputs `(N, C)`, by their kind: features, classes, labels or values.

    Args:
        student: the student's outputs.
        teacher: the teacher's outputs.
        activation: how outputs become probabilities: softmax, sigmoid or none.
        is_backbone: whether they are features.
        temperature: T, for classes and labels.

    Returns:
        An fp32 scalar.
    """
    if is_backbone:
        return feature_distance(student, teacher)
    if ranks(activation, teacher.shape[1]):
        return distillation(student, teacher, temperature)
    if activation == "sigmoid":
        return label_distillation(student, teacher, temperature)
    return value_distance(student, teacher)


def head_structure(student: Tensor, teacher: Tensor, prefix_tokens: int) -> Tensor:
    """The structural loss of an attention's outputs: `1 - mean S`, `S = (2 cov + C2) / (var_t + var_s + C2)`.

    Covariance and variances are those over the patch tokens; the mean is over images, heads and channels.

    Args:
        student: the student's attention output `(B, H, N, d)`, where B is images times windows.
        teacher: the teacher's attention output, of the same shape; gets no gradient.
        prefix_tokens: number of leading tokens that are not patches and are excluded.

    Returns:
        An fp32 scalar: 0 for equal or shifted outputs, about 1 for independent, about 2 for negated ones.
    """
    s = student[:, :, prefix_tokens:].float()
    t = teacher.detach()[:, :, prefix_tokens:].float()
    s, t = s - s.mean(2, keepdim=True), t - t.mean(2, keepdim=True)
    covariance = (s * t).mean(2)
    similarity = (2 * covariance + _C2) / (s.square().mean(2) + t.square().mean(2) + _C2)
    return 1 - torch.mean(similarity)


def block_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The squared error of a block's output, relative to the variance of the teacher's over images and positions.

    Both are sums over channels, so that channels count by their variance, as they do in the residual stream.

    Args:
        student: the student's block output, `(N, ..., C)`.
        teacher: the teacher's, of the same shape; gets no gradient.

    Returns:
        An fp32 scalar: 0 for equal outputs, 1 if the student always gives the teacher's mean.
    """
    s, t = student.float().flatten(0, -2), teacher.detach().float().flatten(0, -2)
    error, variance = (s - t).square().mean(0).sum(), (t - t.mean(0)).square().mean(0).sum()
    return error / variance.clamp(min=1e-12)
