"""Views of calibration images for the student: mirrored, cropped, blurred and relit.

Few images are seen many times each. Mirrored and cropped they stay new; blurred and relit they also cover what their
maker left out. All draws are made on the host, from the seed alone, and images are changed where they are: so a GPU
sees the views that a CPU sees, and nobody waits for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from calibration.views import resample
from fp8pipe.core.devices import to_device
from pipeline.vit.config import DistillConfig

_REACH: Final = 3  # standard deviations a blur looks to either side
_FIRST_VIEWS: Final = 2  # a stream of the seed; a step's own are the distiller's
_SHARPEST: Final = 0.05  # standard deviation, in pixels, below which a blur changes nothing
_TOGETHER: Final = 32  # images that a GPU changes at once


@dataclass(frozen=True, slots=True)
class Draws:
    """How each of N images is changed, on the host."""

    crops: Tensor  # `(N, 4)`, see `crop`
    smallest: float  # side of the smallest crop, as a share of the image's
    blurs: Tensor | None  # `(N,)` standard deviations, pixels; None blurs nothing
    reach: int  # pixels that every blur looks to either side: enough for the strongest
    lights: Tensor | None  # `(N, 3)`, see `relight`; None changes no light

    def part(self, start: int, stop: int) -> Draws:
        """Those of images `start` to `stop - 1`."""
        blurs = None if self.blurs is None else self.blurs[start:stop]
        lights = None if self.lights is None else self.lights[start:stop]
        return replace(self, crops=self.crops[start:stop], blurs=blurs, lights=lights)


def draw(shape: torch.Size, generator: torch.Generator, config: DistillConfig) -> Draws:
    """Draws for images of `shape` `(N, 3, H, W)`."""
    count, side = shape[0], min(shape[-2:])
    crops, blurs, lights = torch.rand(count, 4, generator=generator), None, None
    if config.blur:
        blurs = config.blur * side * torch.rand(count, generator=generator)
    if config.colour:
        lights = config.colour * (2 * torch.rand(count, 3, generator=generator) - 1)
    return Draws(crops, config.smallest_crop, blurs, 0 if blurs is None else blur_reach(blurs, shape), lights)


def first_views(pixels: Tensor, config: DistillConfig, seed: int, device: torch.device | None = None) -> Tensor:
    """One view of each made image `(N, 3, H, W)`, from which ranges, first codes and transforms are measured.

    Measured on made images as they are, they fit a fine detail that pictures do not have. Pictures are measured as
    they are. With `augment` off these are the images themselves.

    Images and views are on the host; `device` changes them, a GPU few at a time.
    """
    if not config.augment:
        return pixels
    place = device or torch.device("cpu")
    generator = torch.Generator().manual_seed(hash((seed, _FIRST_VIEWS)) & 0x7FFFFFFF)
    draws, size = draw(pixels.shape, generator, config), len(pixels) if place.type == "cpu" else _TOGETHER
    views = [
        changed(to_device(pixels[start : start + size], place), draws.part(start, start + size)).cpu()
        for start in range(0, len(pixels), size)
    ]
    return views[0] if len(views) == 1 else torch.cat(views)


def augment(pixels: Tensor, generator: torch.Generator, config: DistillConfig) -> Tensor:
    """Each of the normalized images `(N, 3, H, W)`, on any device, changed in its own way, at the same size."""
    return changed(pixels, draw(pixels.shape, generator, config))


def changed(pixels: Tensor, draws: Draws) -> Tensor:
    """`pixels` as `draws` say, where they are."""
    shown = crop(pixels, draws.crops, draws.smallest)
    if draws.blurs is not None:
        shown = blur(shown, draws.blurs, draws.reach)
    return shown if draws.lights is None else relight(shown, draws.lights)


def crop(pixels: Tensor, draws: Tensor, smallest: float) -> Tensor:
    """Mirror and crop `(N, 3, H, W)`, back to the same size.

    Args:
        pixels: the images.
        draws: `(N, 4)` in [0, 1), on the host: size, mirror (below a half), place across and down.
        smallest: side of the smallest crop, as a share of the image's; 1 does not crop.
    """
    scale = smallest + (1 - smallest) * draws[:, 0]
    mirror = torch.where(draws[:, 1] < 0.5, -1.0, 1.0)
    theta = torch.zeros(len(pixels), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale * mirror, scale
    theta[:, :, 2] = (1 - scale)[:, None] * (2 * draws[:, 2:4] - 1)
    return resample(pixels, theta)


def blur_reach(deviations: Tensor, shape: torch.Size) -> int:
    """Pixels to either side that the strongest of some blurs looks at, in images of `shape`."""
    return min(math.ceil(_REACH * float(deviations.max())), shape[-2] - 1, shape[-1] - 1)


def blur(pixels: Tensor, deviations: Tensor, reach: int | None = None) -> Tensor:
    """Convolve each image `(N, 3, H, W)` with its own Gaussian, edges mirrored.

    `deviations` `(N,)` are in pixels, on the host; `reach` is that of all blurs that are to be alike, `blur_reach` of
    these when None.
    """
    count, channels, height, width = pixels.shape
    reach = blur_reach(deviations, pixels.shape) if reach is None else reach
    if reach < 1:
        return pixels
    at = torch.arange(-reach, reach + 1)
    kernels = torch.exp(-(at**2) / (2 * deviations.clamp(min=_SHARPEST)[:, None] ** 2))
    kernels = (kernels / kernels.sum(1, keepdim=True)).repeat_interleave(channels, 0)[:, None, :]
    kernels = to_device(kernels, pixels.device)
    flat = functional.pad(pixels.reshape(1, count * channels, height, width), (reach,) * 4, mode="reflect")
    flat = functional.conv2d(flat, kernels[:, :, :, None], groups=count * channels)
    return functional.conv2d(flat, kernels[:, :, None, :], groups=count * channels).view_as(pixels)


def relight(pixels: Tensor, changes: Tensor) -> Tensor:
    """Change each image's contrast, brightness and colourfulness; `changes` `(N, 3)` on the host, 0 changes nothing."""
    moved = to_device(changes, pixels.device)
    contrast, brightness, colourfulness = (moved[:, i, None, None, None] for i in range(3))
    mean = pixels.mean((1, 2, 3), keepdim=True)
    shown = (pixels - mean) * (1 + contrast) + mean + brightness
    grey = shown.mean(1, keepdim=True)
    return grey + (shown - grey) * (1 + colourfulness)
