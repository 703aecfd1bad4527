"""What a step shows of an image being optimised: a random view, from a stream of the image's own.

One random stream per image, drawn from on the host whatever device computes: what an image becomes depends on the seed
and its number, not on its batch.

A model recognises many things in a picture that a slightly moved one does not show; only what survives every view is
worth keeping. Two kinds: `shifts`, the published one, and `camera`, which also comes nearer, rotates and relights.

An image made for one class shows it once, on an empty ground. With regions (SARDFQ, arXiv 2412.16553: multi-semantic
reinforcement, soft labels) its four quarters have a class each: a view shows either one quarter, enlarged, which should
be recognised as its class, or the whole, which should show all four. The targets are soft: a softmax of uniform numbers
in [0, 1), with those of the wanted classes from [5, 10). The published method adds the parts to the batch, so a step
costs more; here a part takes the place of the whole in some of the views, and a step costs the same.
"""

from __future__ import annotations

import hashlib
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from calibration.config import SynthesisConfig
from fp8pipe.core.devices import to_device

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
    tint = to_device(_TINT * normal(streams, 3, 1, 1), pixels.device)
    return (shown + tint) * to_device(exposure.exp(), pixels.device), moved


def resample(pictures: Tensor, where: Tensor, edges: str = "reflection") -> Tensor:
    """Pictures `(N, C, H, W)` seen through affine maps `(N, 2, 3)` of [-1, 1] coordinates: same size, bilinear.

    The maps are on the host. `edges` is how `grid_sample` continues a picture beyond its edges.
    """
    where = to_device(where, pictures.device)
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
    place = pixels.device
    return (shown + to_device(offset, place) - to_device(change[:, 0], place)) / to_device(change[:, 1].exp(), place)


def image_stream(seed: int, image: int, attempt: int = 0) -> torch.Generator:
    """The generator of image number `image`; `attempt` counts its restarts."""
    digest = hashlib.sha256(f"{seed} {image} {attempt}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def normal(streams: list[torch.Generator], *shape: int) -> Tensor:
    """Standard normal values, `(len(streams), *shape)`."""
    return torch.stack([torch.randn(shape, generator=stream) for stream in streams])


def uniform(streams: list[torch.Generator], *shape: int) -> Tensor:
    """Uniform values in [0, 1), `(len(streams), *shape)`."""
    return torch.stack([torch.rand(shape, generator=stream) for stream in streams])


QUARTERS: Final = 4
_LEAST, _MOST = 5.0, 10.0  # logits of wanted classes: ours, so that they stand out and differ


def draw_regions(streams: list[torch.Generator], labels: Tensor, classes: int) -> Tensor:
    """Targets `(N, 5, C)` fp32 with sums of 1: the whole image's, then those of its quarters, in reading order.

    The classes of the quarters (the first has the image's label) are drawn from each image's own stream.
    """
    wanted = (uniform(streams, QUARTERS) * classes).long().clamp(max=classes - 1)
    wanted[:, 0] = labels
    each = functional.one_hot(wanted, classes)  # (N, 4, C)
    marked = torch.cat([each.sum(1, keepdim=True), each], 1) > 0
    draws = uniform(streams, 1 + QUARTERS, classes)
    return torch.where(marked, _LEAST + (_MOST - _LEAST) * draws, draws).softmax(-1)


def draw_choice(streams: list[torch.Generator], share: float) -> Tensor:
    """What each view shows, `(N,)` int64: 0 the whole, 1 to 4 a quarter; quarters together in `share` of the views."""
    draws = uniform(streams, 2)
    quarter = 1 + (draws[:, 1] * QUARTERS).long().clamp(max=QUARTERS - 1)
    return torch.where(draws[:, 0] < share, quarter, 0)


def cut(pictures: Tensor, choice: Tensor) -> Tensor:
    """Pictures or maps `(N, C, H, W)` as chosen (on the host), quarters enlarged to the whole size (bilinear)."""
    corner = (choice - 1).clamp(min=0)
    where = torch.zeros(len(choice), 2, 3)
    where[:, 0, 0] = where[:, 1, 1] = 0.5
    where[:, 0, 2] = (corner % 2) - 0.5
    where[:, 1, 2] = (corner // 2) - 0.5
    parts = to_device((choice > 0).view(-1, 1, 1, 1), pictures.device)
    return torch.where(parts, resample(pictures, where, "border"), pictures)
