"""Procedural initial images from the dead-leaves model: overlapping shapes with coloured, textured surfaces.

Vision transformers respond to edges, surfaces, occlusion, and textures with natural spectra; white noise has none of
these, and optimising noise pixels produces few of them. The dead-leaves model (Matheron 1968; Lee, Mumford and Huang
2001, "Occlusion models for natural images") has them by construction: opaque shapes, whose sizes follow a power law,
occlude each other. Here each shape has a texture of 1/f noise and a muted colour, a few large shapes near the centre
form a subject, and some images are out of focus. No real image was used in the design.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from calibration.views import image_stream

_SURFACES = 10
_LEAST_RADIUS, _LARGEST_RADIUS = 0.05, 1.2  # relative to half the image's side
# Two RGB directions along which colours vary: mostly between blue and yellow, less between green and magenta, as in
# daylight.
_CHROMA = ((1.0, 0.2, -1.0), (0.25, -0.5, 0.25))


@dataclass(frozen=True, slots=True)
class _Sheet:
    """Pixel coordinates, from -1 to 1 on both axes, and the image's random stream."""

    rows: Tensor  # `(H, 1)`
    columns: Tensor  # `(1, W)`
    stream: torch.Generator  # see `image_stream`

    def draw(self, count: int) -> list[float]:
        """Uniform numbers in [0, 1)."""
        return torch.rand(count, generator=self.stream).tolist()


def dead_leaves(seed: int, first: int, count: int, size: tuple[int, int]) -> Tensor:
    """Draw images number `first` to `first + count - 1` of a seed.

    `size` is (height, width); returns `(count, 3, H, W)`, fp32 in [0, 1].
    """
    return torch.stack([_picture(image_stream(seed, first + i), size) for i in range(count)])


def _picture(stream: torch.Generator, size: tuple[int, int]) -> Tensor:
    # Draw one image: a background, small and large shapes, and defocus.
    sheet = _Sheet(torch.linspace(-1, 1, size[0]).view(-1, 1), torch.linspace(-1, 1, size[1]).view(1, -1), stream)
    picture = _surface(sheet)
    surfaces = [_surface(sheet) for _ in range(_SURFACES)]
    for _ in range(5 + int(sheet.draw(1)[0] * 40)):
        inside, surface = _leaf(sheet), surfaces[int(sheet.draw(1)[0] * _SURFACES)]
        lightness, slant = torch.randn(2, generator=stream).tolist()
        picture = torch.where(inside, surface + 0.15 * lightness + 0.1 * slant * sheet.rows, picture)
    for _ in range(3 + int(sheet.draw(1)[0] * 5)):
        surface = surfaces[int(sheet.draw(1)[0] * _SURFACES)]
        inside, shade = _part(sheet)
        picture = torch.where(inside, surface + shade, picture)
    return _defocus(picture, 3.0 * sheet.draw(1)[0] * min(size) / 112).clamp(0, 1)


def _surface(sheet: _Sheet) -> Tensor:
    """Draw a surface that covers the whole image: a muted colour with 1/f^a texture, `(3, H, W)`."""
    height, width = sheet.rows.shape[0], sheet.columns.shape[1]
    draws = sheet.draw(4)
    colour = torch.full((3,), 0.05 + 0.9 * draws[0])
    for axis, amount in zip(_CHROMA, torch.randn(2, generator=sheet.stream).tolist(), strict=True):
        colour = colour + 0.18 * draws[1] * amount * torch.tensor(axis)
    noise = torch.randn(3, height, width, generator=sheet.stream)
    noise = 0.9 * math.sqrt(3) * noise.mean(0, keepdim=True) + 0.15 * noise  # mostly brightness, a little hue
    fy, fx = torch.fft.fftfreq(height).view(-1, 1), torch.fft.rfftfreq(width).view(1, -1)
    falloff = (fy.square() + fx.square()).sqrt().clamp(min=1 / max(height, width)).pow(-(0.8 + draws[2]))
    texture = torch.fft.irfft2(torch.fft.rfft2(noise) * falloff, s=(height, width))
    surface: Tensor = colour.clamp(0, 1).view(3, 1, 1) + 0.15 * draws[3] * texture / texture.std().clamp(min=1e-6)
    return surface


def _leaf(sheet: _Sheet) -> Tensor:
    """Draw a shape: an ellipse, a box, a kite or a wavy blob of power-law size, rotated and shifted.

    Returns its mask, boolean `(H, W)`.
    """
    draws = sheet.draw(8)
    # The density of radii is proportional to radius^-3, which makes images scale-invariant.
    share = 1 - (_LEAST_RADIUS / _LARGEST_RADIUS) ** 2
    radius = _LEAST_RADIUS / math.sqrt(1 - draws[0] * share)
    u, v = _own_coordinates(sheet, 2.4 * draws[3] - 1.2, 2.4 * draws[4] - 1.2, radius, 1.2 * (draws[1] - 0.5), draws[2])
    kind = int(draws[5] * 4)
    if kind == 0:
        return u.square() + v.square() < 1
    if kind == 1:
        return (u.abs() < 1) & (v.abs() < 1)
    if kind == 2:
        return (u.abs() + v.abs() < 1) | ((v > -1) & (v < 0) & (u.abs() < 1 + v))
    wave = 1 + 0.35 * torch.sin(torch.atan2(v, u) * (2 + int(draws[6] * 6)) + 2 * math.pi * draws[7])
    return u.square() + v.square() < wave.square()


def _part(sheet: _Sheet) -> tuple[Tensor, Tensor]:
    """Draw a large rounded shape near the centre: its mask, boolean `(H, W)`, and its shading, fp32 `(H, W)`."""
    draws = sheet.draw(7)
    radius = 0.15 + 0.45 * draws[0]
    u, v = _own_coordinates(
        sheet, 0.9 * (draws[1] - 0.5), 0.9 * (draws[2] - 0.5), radius, 1.4 * (draws[4] - 0.5), draws[3]
    )
    power = 2 + 2 * draws[5]  # from an ellipse to almost a box
    return u.abs() ** power + v.abs() ** power < 1, 0.1 * draws[6] * (u + v)


def _own_coordinates(
    sheet: _Sheet, row: float, column: float, radius: float, stretch: float, rotation: float
) -> tuple[Tensor, Tensor]:
    """Pixel coordinates along a shape's own axes, scaled so that its edge is at 1.

    `row` and `column` are its centre, `stretch` is half the logarithm of its aspect ratio, `rotation` is in turns.
    """
    angle = 2 * math.pi * rotation
    y, x = sheet.rows - row, sheet.columns - column
    u = (x * math.cos(angle) + y * math.sin(angle)) / (radius * math.exp(stretch))
    v = (y * math.cos(angle) - x * math.sin(angle)) / (radius / math.exp(stretch))
    return u, v


def _defocus(picture: Tensor, sigma: float) -> Tensor:
    """Blur an image with a Gaussian whose standard deviation is `sigma` pixels; not at all below 0.3."""
    reach = min(int(3 * sigma) + 1, min(picture.shape[1:]) - 1)
    if sigma < 0.3:
        return picture
    kernel = torch.exp(-torch.arange(-reach, reach + 1).square() / (2 * sigma * sigma))
    kernel = (kernel / kernel.sum()).repeat(3, 1)
    wide = functional.pad(picture.unsqueeze(0), (reach, reach, reach, reach), mode="reflect")
    across = functional.conv2d(wide, kernel.view(3, 1, 1, -1), groups=3)
    return functional.conv2d(across, kernel.view(3, 1, -1, 1), groups=3)[0]
