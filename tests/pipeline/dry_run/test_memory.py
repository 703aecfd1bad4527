"""The memory of the final merge in several processes: moments, which each process holds for the layers it rounds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipeline.dry_run.memory import phase_bytes
from pipeline.dry_run.workload import Group, Workload

SIDE, LAYERS = 1024, 16
WORK = Workload(
    method="falqon", groups=(Group((SIDE,), SIDE),) * LAYERS, rank=1, gradients=False, compensated=True, flushes=False,
    layers=LAYERS, hidden=SIDE, query=SIDE, vocabulary=8, itemsize=2, stored=(0, 0), mapped=False, streamed=False,
    filed=True, shard=0, tokens=1, length=1, answers=1, saved=0, checkpointing=False,
)  # fmt: skip


def test_processes_share_moments_and_codes_but_each_needs_a_solver():
    merge = {size: phase_bytes(replace(WORK, processes=size, shards=size))["final merge"] for size in (2, 4)}
    moments, codes = (LAYERS * size * SIDE**2 for size in (4, 1))
    # Each also has whole for the merge the codes that it rounds, 1/W of them.
    assert merge[2] - merge[4] == pytest.approx((moments + 2 * codes) / 4, rel=0.01)
    assert merge[4] > (moments + 2 * codes) / 4 + 28 * SIDE**2
