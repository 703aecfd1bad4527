"""Schedules: their shape at the ends, and that warm-up never exceeds the peak."""

from __future__ import annotations

import pytest

from pipeline.finetune.config import Schedule, learning_rate_at


@pytest.mark.parametrize("schedule", list(Schedule))
def test_warmup_rises_to_the_peak_and_nothing_exceeds_it(schedule):
    rates = [learning_rate_at(s, peak=2.0, steps=50, warmup=10, schedule=schedule) for s in range(50)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10] == 2.0
    assert max(rates) == 2.0
    assert rates[0] > 0
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_ends():
    last = {s: learning_rate_at(100, peak=1.0, steps=100, warmup=0, schedule=s) for s in Schedule}
    assert last[Schedule.CONSTANT] == 1.0
    assert last[Schedule.LINEAR] == 0.0
    assert last[Schedule.COSINE] == pytest.approx(0.0, abs=1e-12)
    assert learning_rate_at(50, peak=1.0, steps=100, warmup=0, schedule=Schedule.COSINE) == pytest.approx(0.5)
