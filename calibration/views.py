"""Random views of an image being optimised: the model never sees quite the same twice.

A model recognises many things in a picture that a slightly moved one does not show; only what survives every view is
worth keeping. Two kinds: `shifts`, the published one, and `camera`, which also comes nearer, rotates and relights.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from calibration.config import SynthesisConfig
from calibration.streams import normal, uniform

_FARTHEST = 1.15  # of the picture's side, mirrored at the edges
_ROTATION = 0.25  # radians to either side
_TINT, _EXPOSURE = 0.2, 0.3


def view(
    pixels: Tensor, maps: Tensor | None, streams: list[torch.Generator], step: int, config: SynthesisConfig
) -> tuple[Tensor, Tensor | None]:
    """A view of each image, drawn from its own stream, and maps over it as they lie in the view.

    Args:
        pixels: `(N, 3, H, W)`.
        maps: `(N, C, rows, columns)` of any resolution, or None. `shifts`, which are small, leave them in place.
        streams: of the images.
        step: number of the step.
        config: which views.
    """
    if config.views == "camera":
        return _camera(pixels, maps, streams, config)
    return _shifts(pixels, streams, step, config), maps


def _camera(
    pixels: Tensor, maps: Tensor | None, streams: list[torch.Generator], config: SynthesisConfig
) -> tuple[Tensor, Tensor | None]:
    draws = uniform(streams, 5)
    size = config.nearest + (_FARTHEST - config.nearest) * draws[:, 0]
    mirror = torch.where(draws[:, 1] < 0.5, -1.0, 1.0)
    angle = _ROTATION * (2 * draws[:, 4] - 1)
    room = (1 - size).clamp(min=0.1)
    where = torch.zeros(len(streams), 2, 3)
    where[:, 0, 0], where[:, 0, 1] = size * mirror * angle.cos(), -size * angle.sin()
    where[:, 1, 0], where[:, 1, 1] = size * mirror * angle.sin(), size * angle.cos()
    where[:, :, 2] = room[:, None] * (2 * draws[:, 2:4] - 1)
    shown, moved = resample(pixels, where), None if maps is None else resample(maps, where)
    exposure = _EXPOSURE * (2 * uniform(streams, 1, 1, 1) - 1)
    return (shown + _TINT * normal(streams, 3, 1, 1)) * exposure.exp(), moved


def resample(pictures: Tensor, where: Tensor, edges: str = "reflection") -> Tensor:
    """Pictures `(N, C, H, W)` seen through affine maps `(N, 2, 3)` of [-1, 1] coordinates: same size, bilinear.

    `edges` is how `grid_sample` continues a picture beyond its edges.
    """
    grid = functional.affine_grid(where, list(pictures.shape), align_corners=False)
    return functional.grid_sample(pictures, grid, mode="bilinear", padding_mode=edges, align_corners=False)


def _shifts(pixels: Tensor, streams: list[torch.Generator], step: int, config: SynthesisConfig) -> Tensor:
    """Circular shifts, mirroring, and MimiQ's decaying colour offset with random contrast, as configured."""
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
    return (shown + offset - change[:, 0]) / change[:, 1].exp()
