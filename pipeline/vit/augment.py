"""Augmentation: the views of calibration images that student and teacher are shown.

Few images are seen many times each. Mirrored and cropped they stay new; blurred and relit they also cover what their
maker left out: synthetic images have more fine detail and stronger colours than pictures do, and ranges and weights
learned on those alone fit pictures badly. MimiQ's distillation blurs, jitters and mirrors too (arXiv 2407.20021).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from calibration.views import resample
from pipeline.vit.config import DistillConfig

_REACH = 3  # standard deviations a blur looks to either side
_FIRST_VIEWS = 2  # a stream of the seed; a step's own are the distiller's
_SHARPEST = 0.05  # standard deviation, in pixels, below which a blur changes nothing


def first_views(pixels: Tensor, config: DistillConfig, seed: int) -> Tensor:
    """One view of each made image, from which ranges, first codes and equivalent transforms are measured.

    Measured on made images as they are, they fit a fine detail that pictures do not have. Pictures are measured as
    they are.

    Args:
        pixels: `(N, 3, H, W)`, normalized.
        config: `augment` off shows the images themselves.
        seed: of the run.
    """
    generator = torch.Generator().manual_seed(hash((seed, _FIRST_VIEWS)) & 0x7FFFFFFF)
    return augment(pixels, generator, config) if config.augment else pixels


def augment(pixels: Tensor, generator: torch.Generator, config: DistillConfig) -> Tensor:
    """Each image changed in its own way, at the same size.

    Args:
        pixels: `(N, 3, H, W)`, normalized.
        generator: source of the draws.
        config: `smallest_crop`, `blur` and `colour`.
    """
    shown = crop(pixels, torch.rand(len(pixels), 4, generator=generator), config.smallest_crop)
    if config.blur:
        side = min(pixels.shape[-2:])
        shown = blur(shown, config.blur * side * torch.rand(len(pixels), generator=generator))
    if config.colour:
        shown = relight(shown, config.colour * (2 * torch.rand(len(pixels), 3, generator=generator) - 1))
    return shown


def crop(pixels: Tensor, draws: Tensor, smallest: float) -> Tensor:
    """Mirror and crop, back to the same size.

    Args:
        pixels: `(N, 3, H, W)`.
        draws: `(N, 4)` in [0, 1): size, mirror (below a half), place across and down.
        smallest: side of the smallest crop, as a share of the image's; 1 does not crop.
    """
    scale = smallest + (1 - smallest) * draws[:, 0]
    mirror = torch.where(draws[:, 1] < 0.5, -1.0, 1.0)
    theta = torch.zeros(len(pixels), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale * mirror, scale
    theta[:, :, 2] = (1 - scale)[:, None] * (2 * draws[:, 2:4] - 1)
    return resample(pixels, theta)


def blur(pixels: Tensor, deviations: Tensor) -> Tensor:
    """Convolve each image `(N, 3, H, W)` with its own Gaussian; `deviations` `(N,)` in pixels, edges mirrored."""
    count, channels, height, width = pixels.shape
    reach = min(math.ceil(_REACH * float(deviations.max())), height - 1, width - 1)
    if reach < 1:
        return pixels
    at = torch.arange(-reach, reach + 1)
    kernels = torch.exp(-(at**2) / (2 * deviations.clamp(min=_SHARPEST)[:, None] ** 2))
    kernels = (kernels / kernels.sum(1, keepdim=True)).repeat_interleave(channels, 0)[:, None, :]
    flat = functional.pad(pixels.reshape(1, count * channels, height, width), (reach,) * 4, mode="reflect")
    flat = functional.conv2d(flat, kernels[:, :, :, None], groups=count * channels)
    return functional.conv2d(flat, kernels[:, :, None, :], groups=count * channels).view_as(pixels)


def relight(pixels: Tensor, changes: Tensor) -> Tensor:
    """Change each image's contrast, brightness and colourfulness; `changes` `(N, 3)`, 0 changes nothing."""
    contrast, brightness, colourfulness = (changes[:, i, None, None, None] for i in range(3))
    mean = pixels.mean((1, 2, 3), keepdim=True)
    shown = (pixels - mean) * (1 + contrast) + mean + brightness
    grey = shown.mean(1, keepdim=True)
    return grey + (shown - grey) * (1 + colourfulness)
