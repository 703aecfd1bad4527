"""Learning-rate schedules as plain functions of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from enum import StrEnum


class Schedule(StrEnum):
    """Shape of the learning rate after warm-up."""

    COSINE = "cosine"
    LINEAR = "linear"
    CONSTANT = "constant"


def learning_rate_at(step: int, *, peak: float, steps: int, warmup: int, schedule: Schedule) -> float:
    """The learning rate of optimizer step `step` (from 0) of `steps`.

    Warm-up rises linearly and reaches `peak` at step `warmup`; cosine and linear then fall to zero at `steps`.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if schedule is Schedule.CONSTANT:
        return peak
    done = (step - warmup) / max(1, steps - warmup)
    if schedule is Schedule.LINEAR:
        return peak * (1.0 - done)
    return peak * 0.5 * (1.0 + math.cos(math.pi * done))
