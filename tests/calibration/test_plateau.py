"""When an image is finished early."""

from __future__ import annotations

import math

import torch

from calibration.generator import Plateau


def test_an_image_leaves_when_its_loss_stops_falling():
    watch = Plateau(0.02, 3)
    going = [watch.going(torch.tensor([10.0 - step, 5.0, math.nan])).tolist() for step in range(6)]
    assert going == [[True] * 3] * 5 + [[True, False, True]]  # after two windows; the synthesizer starts NaN again
    assert watch.going(torch.tensor([3.9, math.nan])).shape == (2,)
    assert all(bool(Plateau(0.0, 1).going(torch.zeros(2)).all()) for _ in range(5))
