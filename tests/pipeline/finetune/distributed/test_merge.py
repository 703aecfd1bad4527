"""The final merge in several processes: each layer is rounded once, with the bits of one process."""

from __future__ import annotations

import pytest
from rank_merge import merged, moments
from ranks import run_ranks

from pipeline.finetune.distributed.merge import deal

ALL, ONE = 1 << 29, 1  # bytes of moments: all layers form one group, or each its own


def test_moments_of_shared_batches_have_the_bits_of_one_process():
    found = run_ranks(2, moments)  # three batches: one process has none in the second round
    assert [len(one) for one in found.values()] == [4, 4]
    assert found[0].keys().isdisjoint(found[1])
    every = [*found[0].values(), *found[1].values()]
    assert all(same for same, _ in every)
    assert not all(reordered for _, reordered in every)  # else the order would be no part of the test


@pytest.mark.parametrize(
    ("size", "family", "how", "budget"),
    [(2, "llama", "compensated", ALL), (2, "llama", "nearest", ONE), (3, "mixtral", "compensated", ALL)],
)
def test_each_layer_is_rounded_by_one_process_with_the_bits_of_one(size, family, how, budget):
    found = run_ranks(size, merged, family, how, budget)
    assert all(one["same"] for one in found.values())
    layers = found[0]["layers"]
    assert sorted(name for one in found.values() for name in one["rounded"]) == sorted(layers)
    assert found[0]["changed"] > 100
    for one in found.values():
        alone, shared = one["unseen"]
        assert shared == alone  # every process knows, though only the main one says so
        assert bool(alone) == (family == "mixtral")  # an expert that no token has reached
    busy = [len(one["rounded"]) for one in found.values()]
    assert min(busy) > 0 if budget == ALL else busy == [len(layers), 0]  # groups of one layer cannot be shared


def test_work_is_dealt_by_its_cost():
    assert deal({"a": 1, "b": 7, "c": 3, "d": 3, "e": 1}, 2) == {"b": 0, "c": 1, "d": 1, "a": 1, "e": 0}
    assert deal({"a": 2, "b": 1}, 4) == {"a": 0, "b": 1}
