"""What a decoder layer asks of a GPU between its products, in a step with recomputation; it may only become less.

A layer of LLaMA-7B, rank 64, 16 x 512 tokens, `live`, counted operator by operator (`support/kernel_counts.py`) for
each generation of GPUs: at most 230 kernels and 30 GB uncompiled, whether Triton casts or torch, and 12 GB compiled, as
Inductor plans it.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from kernel_counts import as_on_cuda, count_layer, to_falqon

from pipeline.dry_run import costs

SHAPES = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "head_dim": 128}
RANK = 64
# Kernels and GB: with torch's casts, and with Triton's. Where no product scales rows, they are multiplied afterwards.
ROWWISE, TENSORWISE = ((215, 26.0), (155, 23.8)), ((227, 29.6), (167, 27.4))
LIMITS = {(8, 9): TENSORWISE, (9, 0): ROWWISE, (10, 0): ROWWISE, (12, 0): TENSORWISE}


@pytest.fixture(autouse=True)
def _forget_graphs():
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("triton", [False, True], ids=["torch", "triton"])
@pytest.mark.parametrize("capability", LIMITS, ids=lambda found: ".".join(map(str, found)))
def test_an_uncompiled_layer_asks_no_more_than_before(capability, triton):
    with as_on_cuda(capability, triton=triton):
        forward, backward = count_layer(SHAPES, 16, 512, partial(to_falqon, rank=RANK))
    counted = 2 * forward.kernels + backward.kernels, (2 * forward.bytes + backward.bytes) / 1e9
    assert all(now <= limit for now, limit in zip(counted, LIMITS[capability][triton], strict=True)), counted


def test_the_limits_are_within_what_was_promised():
    assert all(kernels <= 230 and traffic <= 30 for both in LIMITS.values() for kernels, traffic in both)


def test_a_compiled_layer_is_planned_as_the_cost_model_says(monkeypatch):
    """Some ten seconds: AOTAutograd and Inductor on a real layer, both passes."""
    pytest.importorskip("triton", reason="Inductor plans for CUDA with Triton: pip install triton")
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "benchmarks")
    import compiled_plan

    (forward, moved), (backward, back_moved) = compiled_plan.plan_layer()
    kernels, traffic = 2 * forward + backward, (2 * moved + back_moved) / 1e9
    assert kernels <= 35
    assert traffic <= 6.4 < 12
    assert pytest.approx(traffic / 25.5, rel=0.02) == costs.COMPILED_TRAFFIC
