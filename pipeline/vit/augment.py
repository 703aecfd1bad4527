"""Augmentation of calibration images: mirroring, cropping, blurring and changes of contrast, brightness and saturation.

There are few images, and each is used many times. Mirroring and cropping add variety; blurring and changes of lighting
make synthetic images more similar to photographs. All random draws are made on the host and depend only on the seed;
images are changed on their own device. So a GPU gets the same views as a CPU, without GPU synchronizations.
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

_REACH: Final = 3  # radius of a blur kernel, in standard deviations
_FIRST_VIEWS: Final = 2  # combined with the seed to get an independent random stream; the distiller uses 0 and 1
_SHARPEST: Final = 0.05  # standard deviation, in pixels, below which a blur changes nothing
_TOGETHER: Final = 32  # number of images per batch on a GPU


@dataclass(frozen=True, slots=True)
class Draws:
    """The random draws for the augmentation of N images, on the host."""

    crops: Tensor  # `(N, 4)`, see `crop`
    smallest: float  # side of the smallest crop, relative to the image's side
    blurs: Tensor | None  # `(N,)` standard deviations, pixels; None: no blur
    reach: int  # radius of all blur kernels, pixels: enough for the strongest blur
    lights: Tensor | None  # `(N, 3)`, see `relight`; None: no change of lighting

    def part(self, start: int, stop: int) -> Draws:
        """The draws of images `start` to `stop - 1`."""
        blurs = None if self.blurs is None else self.blurs[start:stop]
        lights = None if self.lights is None else self.lights[start:stop]
        return replace(self, crops=self.crops[start:stop], blurs=blurs, lights=lights)


def draw(shape: torch.Size, generator: torch.Generator, config: DistillConfig) -> Draws:
    """Make the random draws for the augmentation of images of `shape` `(N, 3, H, W)`, with a CPU generator."""
    count, side = shape[0], min(shape[-2:])
    crops, blurs, lights = torch.rand(count, 4, generator=generator), None, None
    if config.blur:
        blurs = config.blur * side * torch.rand(count, generator=generator)
    if config.colour:
        lights = config.colour * (2 * torch.rand(count, 3, generator=generator) - 1)
    return Draws(crops, config.smallest_crop, blurs, 0 if blurs is None else blur_reach(blurs, shape), lights)


def first_views(pixels: Tensor, config: DistillConfig, seed: int, device: torch.device | None = None) -> Tensor:
    """One random view of each synthetic image, used to calibrate ranges, initial codes and transforms.

    Synthetic images have fine detail that photographs lack, to which calibration on unchanged images would adapt. For
    photographs this function is not called.

    Args:
        pixels: normalized images `(N, 3, H, W)`, on the host.
        config: determines the augmentation; if `augment` is off, the images themselves are returned.
        seed: seed of the random draws.
        device: the device that computes the views, on a GPU in small batches; None for the CPU.

    Returns:
        The views `(N, 3, H, W)`, on the host.
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
    """A random view of each normalized image `(N, 3, H, W)`, of the same size and on the device of `pixels`."""
    return changed(pixels, draw(pixels.shape, generator, config))


def changed(pixels: Tensor, draws: Draws) -> Tensor:
    """Augment the images `pixels` `(N, 3, H, W)` as given by `draws`, on their device."""
    shown = crop(pixels, draws.crops, draws.smallest)
    if draws.blurs is not None:
        shown = blur(shown, draws.blurs, draws.reach)
    return shown if draws.lights is None else relight(shown, draws.lights)


def crop(pixels: Tensor, draws: Tensor, smallest: float) -> Tensor:
    """Mirror and crop images, and resize them to their original size.

    Args:
        pixels: images `(N, 3, H, W)`.
        draws: `(N, 4)` in [0, 1), on the host: the size of the crop, whether to mirror (if below 0.5), and the
            horizontal and vertical position of the crop.
        smallest: side of the smallest crop, relative to the image's side; 1 turns cropping off.
    """
    scale = smallest + (1 - smallest) * draws[:, 0]
    mirror = torch.where(draws[:, 1] < 0.5, -1.0, 1.0)
    theta = torch.zeros(len(pixels), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale * mirror, scale
    theta[:, :, 2] = (1 - scale)[:, None] * (2 * draws[:, 2:4] - 1)
    return resample(pixels, theta)


def blur_reach(deviations: Tensor, shape: torch.Size) -> int:
    """The kernel radius, in pixels, that the strongest blur needs; smaller than the sides of images of `shape`."""
    return min(math.ceil(_REACH * float(deviations.max())), shape[-2] - 1, shape[-1] - 1)


def blur(pixels: Tensor, deviations: Tensor, reach: int | None = None) -> Tensor:
    """Convolve each image with its own Gaussian kernel, with reflection at the edges.

    Args:
        pixels: images `(N, 3, H, W)`.
        deviations: standard deviations `(N,)` in pixels, on the host.
        reach: kernel radius in pixels; default: `blur_reach` of these deviations. If a set of images is split into
            batches, all of them must use the same radius to give the same results as a single batch.
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
    """Change contrast, brightness and saturation of each image `(N, 3, H, W)`.

    Args:
        pixels: normalized images.
        changes: `(N, 3)`, on the host: relative change of contrast, added brightness (in normalized units), relative
            change of saturation; 0 leaves an image unchanged.
    """
    moved = to_device(changes, pixels.device)
    contrast, brightness, colourfulness = (moved[:, i, None, None, None] for i in range(3))
    mean = pixels.mean((1, 2, 3), keepdim=True)
    shown = (pixels - mean) * (1 + contrast) + mean + brightness
    grey = shown.mean(1, keepdim=True)
    return grey + (shown - grey) * (1 + colourfulness)
