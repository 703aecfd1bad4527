"""A class for each quarter of an image (SARDFQ, arXiv 2412.16553: multi-semantic reinforcement, soft labels).

An image made for one class shows it once, on an empty ground. Here its four quarters have a class each: a view shows
either one quarter, enlarged, which should be recognised as its class, or the whole, which should show all four.
The targets are soft: a softmax of uniform numbers in [0, 1), with those of the wanted classes from [5, 10).

The published method adds the parts to the batch, so a step costs more; here a part takes the place of the whole in
some of the views, and a step costs the same.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from calibration.streams import uniform
from calibration.views import resample

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
    """Pictures or maps `(N, C, H, W)` as chosen, quarters enlarged to the whole size (bilinear)."""
    corner = (choice - 1).clamp(min=0)
    where = torch.zeros(len(choice), 2, 3)
    where[:, 0, 0] = where[:, 1, 1] = 0.5
    where[:, 0, 2] = (corner % 2) - 0.5
    where[:, 1, 2] = (corner // 2) - 0.5
    return torch.where((choice > 0).view(-1, 1, 1, 1), resample(pictures, where, "border"), pictures)
