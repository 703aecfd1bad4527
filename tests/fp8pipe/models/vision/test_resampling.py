"""Resized pictures are torchvision's, code by code, for every filter and any change of size."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from fp8pipe.models.vision.resampling import KERNELS, resample

# (height, width) before and after: smaller, larger (also by more than eight), both at once, one axis, thin strips.
CHANGES = [
    ((300, 451), (32, 48)), ((90, 161), (57, 102)), ((31, 47), (224, 340)), ((7, 5), (224, 160)), ((1, 1), (32, 32)),
    ((3, 200), (32, 2133)), ((200, 3), (32, 32)), ((64, 64), (64, 37)), ((64, 64), (63, 65)), ((32, 33), (64, 66)),
    ((1300, 20), (16, 16)),
]  # fmt: skip


def picture(shape: tuple[int, int]) -> np.ndarray:
    """Noise in all codes, so that filters overshoot at both ends."""
    return np.random.default_rng(shape[0] * 1000 + shape[1]).integers(0, 256, (*shape, 3), dtype=np.uint8)


def torch_resized(codes: np.ndarray, size: tuple[int, int], kernel: str) -> np.ndarray:
    """What torchvision calls for 8-bit tensors."""
    tensor = torch.from_numpy(codes).permute(2, 0, 1)[None]
    found = interpolate(tensor, size=list(size), mode=kernel, antialias=True, align_corners=False)
    return found[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize(("given", "wanted"), CHANGES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_code_is_torchs(kernel: str, given: tuple[int, int], wanted: tuple[int, int]):
    codes = picture(given)
    found = resample(codes, wanted, kernel)
    assert found.dtype == np.uint8
    assert np.array_equal(found, torch_resized(codes, wanted, kernel))


def test_pillow_differs_by_two_codes_where_a_bicubic_filter_enlarges():
    """Which is why its own resize does not serve: the difference is not in the pictures, but in the arithmetic."""
    codes = picture((31, 47))
    pillow = np.asarray(Image.fromarray(codes).resize((340, 224), Image.Resampling.BICUBIC)).astype(int)
    apart = np.abs(pillow - resample(codes, (224, 340), "bicubic"))
    assert apart.max() == 2
    assert 0 < np.mean(apart == 2) < 1e-3
