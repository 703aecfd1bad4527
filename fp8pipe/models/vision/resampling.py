"""Resizes images exactly as torchvision resizes 8-bit images, but with numpy, because servers have no torch.

transformers' image processors resize with torchvision. Pillow's results differ: its filter weights are integers of 22
bits, torchvision's of at most 15 bits, so that values near a half are rounded to different 8-bit numbers. After the
second pass of a bicubic filter, whose weights can exceed one, the difference may be two. This module reproduces
torchvision's arithmetic exactly: rows first, then columns, each pass rounded to 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

# Limit for the integer weights, which torchvision stores as int16, and the largest number of their fractional bits.
_WEIGHT_LIMIT: Final = 1 << 15
_MOST_PLACES: Final = 22
# Number of output columns per matrix multiplication: larger tiles multiply more zeros, smaller ones need more calls.
_TILE: Final = 16
# Number of pixels converted to float64 at a time, so that they fit into the cache.
_BLOCK: Final = 1 << 17


def resample(rgb: np.ndarray, size: tuple[int, int], kernel: str) -> np.ndarray:
    """Resize an image with antialiasing.

    Args:
        rgb: the image, (H, W, 3) uint8.
        size: (height, width) in pixels.
        kernel: one of `KERNELS`; bicubic uses a = -0.5, lanczos has a support of three pixels.

    Returns:
        (height, width, 3) uint8.
    """
    planes = np.moveaxis(rgb, 2, 0)
    if planes.shape[2] != size[1]:
        planes = _resample_last(planes, size[1], kernel)
    if planes.shape[1] != size[0]:
        planes = _resample_last(planes.swapaxes(1, 2), size[0], kernel).swapaxes(1, 2)
    return np.ascontiguousarray(np.moveaxis(planes, 0, 2))


def _resample_last(planes: np.ndarray, size: int, kernel: str) -> np.ndarray:
    """Resample the last axis: (C, N, L) uint8 -> (C, N, size) uint8."""
    rows = planes.reshape(-1, planes.shape[2])
    starts, weights, places = _integer_weights(rows.shape[1], size, kernel)
    bands = [(at, starts[at], _band(starts, weights, at)) for at in range(0, size, _TILE)]
    found = np.empty((len(rows), size), np.uint8)
    step = max(1, _BLOCK // rows.shape[1])
    for top in range(0, len(rows), step):
        pixels = rows[top : top + step].astype(np.float64)
        sums = np.empty((len(pixels), size))
        for at, first, band in bands:
            window = pixels[:, first : first + len(band)]
            # All sums are integers far below 2**53, and therefore exact in float64 in any order.
            sums[:, at : at + _TILE] = window @ band[: window.shape[1]]
        found[top : top + step] = np.floor(sums / 2**places + 0.5).clip(0, 255)
    return found.reshape(*planes.shape[:2], size)


def _band(starts: np.ndarray, weights: np.ndarray, at: int) -> np.ndarray:
    """Weights of the output columns from index `at` on, at most `_TILE`, as a banded matrix (pixels, columns).

    Its first row belongs to the first input pixel that these columns use.
    """
    rows, offsets = weights[at : at + _TILE], starts[at : at + _TILE] - starts[at]
    band = np.zeros((offsets[-1] + rows.shape[1], len(rows)))
    band[offsets[:, None] + np.arange(rows.shape[1]), np.arange(len(rows))[:, None]] = rows
    return band


def _integer_weights(given: int, wanted: int, kernel: str) -> tuple[np.ndarray, np.ndarray, int]:
    """The filter for resizing an axis from `given` to `wanted` pixels.

    Returns:
        Index of the first input pixel of each output pixel (wanted,); integer weights (wanted, taps) as float64; and
        the number of their fractional bits.
    """
    radius, function = KERNELS[kernel]
    scale = given / wanted
    stretch = max(scale, 1.0)
    support = radius * stretch
    centers = scale * (np.arange(wanted) + 0.5)
    starts = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    ends = np.minimum((centers + support + 0.5).astype(np.int64), given)
    taps = np.arange(int(np.ceil(support)) * 2 + 1)
    weights = function((taps + (starts - centers)[:, None] + 0.5) * (1.0 / stretch))
    weights[taps >= (ends - starts)[:, None]] = 0.0
    weights /= np.cumsum(weights, axis=1)[:, -1:]
    largest, places = float(weights.max()), 0
    while places < _MOST_PLACES and int(0.5 + largest * 2 ** (places + 1)) < _WEIGHT_LIMIT:
        places += 1
    return starts, np.trunc(weights * 2**places + np.copysign(0.5, weights)), places


def _bilinear(x: np.ndarray) -> np.ndarray:
    weights: np.ndarray = np.maximum(1.0 - np.abs(x), 0.0)
    return weights


def _bicubic(x: np.ndarray) -> np.ndarray:
    a, x = -0.5, np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


KERNELS: Final[dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]]] = {
    "bilinear": (1, _bilinear),
    "bicubic": (2, _bicubic),
    "lanczos": (3, _lanczos),
}
