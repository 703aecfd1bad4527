"""Random views of an image for each optimisation step, drawn from the image's own random stream.

Each image has its own random number generator, its stream, which is always on the host. So an image depends on the
seed and its number, and not on its batch or the device.

A model may recognise features in an image that vanish when it is slightly shifted; with random views, features that
remain after such changes prevail. There are two kinds of views: `shifts`, as published, and `camera`, which also zooms,
rotates and changes the lighting.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.nn import functional

from calibration.config import SynthesisConfig
from fp8pipe.core.devices import to_device

_FARTHEST = 1.15  # largest visible part, relative to the image's side; beyond its edges the image is mirrored
_ROTATION = 0.25  # maximum angle, radians
_TINT, _EXPOSURE = 0.2, 0.3  # standard deviation of the colour offset, and largest log of the brightness factor


def view(pixels: Tensor, streams: list[torch.Generator], step: int, config: SynthesisConfig) -> Tensor:
    """Make a random view of each image.

    Args:
        pixels: `(N, 3, H, W)`.
        streams: the images' random streams.
        step: number of the step.
        config: kind and strength of the views.

    Returns:
        Views, of the same shape.
    """
    if config.views == "camera":
        return _camera(pixels, streams, config)
    return _shifts(pixels, streams, step, config)


def _camera(pixels: Tensor, streams: list[torch.Generator], config: SynthesisConfig) -> Tensor:
    # Views that are zoomed, mirrored, rotated, shifted, and changed in brightness and colour.
    draws = uniform(streams, 5)
    size = config.nearest + (_FARTHEST - config.nearest) * draws[:, 0]
    mirror = torch.where(draws[:, 1] < 0.5, -1.0, 1.0)
    angle = _ROTATION * (2 * draws[:, 4] - 1)
    room = (1 - size).clamp(min=0.1)
    where = torch.zeros(len(streams), 2, 3)
    where[:, 0, 0], where[:, 0, 1] = size * mirror * angle.cos(), -size * angle.sin()
    where[:, 1, 0], where[:, 1, 1] = size * mirror * angle.sin(), size * angle.cos()
    where[:, :, 2] = room[:, None] * (2 * draws[:, 2:4] - 1)
    shown = resample(pixels, where)
    exposure = _EXPOSURE * (2 * uniform(streams, 1, 1, 1) - 1)
    tint = to_device(_TINT * normal(streams, 3, 1, 1), pixels.device)
    return (shown + tint) * to_device(exposure.exp(), pixels.device)


def resample(pictures: Tensor, where: Tensor, edges: str = "reflection") -> Tensor:
    """Transform images `(N, C, H, W)` affinely, with bilinear interpolation; their size stays the same.

    `where`, `(N, 2, 3)` on the host, maps coordinates of the result to those of the image, both in [-1, 1]. `edges` is
    the `padding_mode` of `grid_sample`.
    """
    where = to_device(where, pictures.device)
    grid = functional.affine_grid(where, list(pictures.shape), align_corners=False)
    return functional.grid_sample(pictures, grid, mode="bilinear", padding_mode=edges, align_corners=False)


def _shifts(pixels: Tensor, streams: list[torch.Generator], step: int, config: SynthesisConfig) -> Tensor:
    """Circular shifts, and, if configured, mirroring and MimiQ's decaying colour offset with random contrast."""
    draws = uniform(streams, 3)
    reach = config.jitter * (1 if step < config.steps / 2 else 2)
    shifts = torch.floor(draws[:, :2] * (2 * reach + 1)).long() - reach
    views = []
    for image, (dy, dx), mirror in zip(pixels, shifts.tolist(), draws[:, 2].tolist(), strict=True):
        shown = image.roll((dy, dx), (1, 2)) if reach else image
        views.append(shown.flip(2) if config.mirror and mirror < 0.5 else shown)
    shown = torch.stack(views)
    if not config.colour:
        return shown
    offset = normal(streams, 3, 1, 1) * 0.5 * (config.steps - 1 - step) / config.steps
    change = 2 * uniform(streams, 2, 3, 1, 1) - 1
    place = pixels.device
    return (shown + to_device(offset, place) - to_device(change[:, 0], place)) / to_device(change[:, 1].exp(), place)


def image_stream(seed: int, image: int, attempt: int = 0) -> torch.Generator:
    """Create the random number generator of image number `image`; `attempt` is the number of its restarts."""
    digest = hashlib.sha256(f"{seed} {image} {attempt}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def normal(streams: list[torch.Generator], *shape: int) -> Tensor:
    """Draw standard normal values `(len(streams), *shape)`, each row from its own stream."""
    return torch.stack([torch.randn(shape, generator=stream) for stream in streams])


def uniform(streams: list[torch.Generator], *shape: int) -> Tensor:
    """Draw uniform values in [0, 1), `(len(streams), *shape)`, each row from its own stream."""
    return torch.stack([torch.rand(shape, generator=stream) for stream in streams])
