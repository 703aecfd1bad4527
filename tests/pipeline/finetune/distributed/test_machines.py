"""Several machines, each with a replica of the parameters: the same bits, and fewer bytes between them."""

from __future__ import annotations

import json

import pytest
from breadth import only_long
from rank_machines import laid_out, tuned_on_machines
from rank_work import tuned
from ranks import assert_same, run_ranks

from fp8pipe.core import machine
from pipeline.finetune.distributed.machines import count_replicas

# In fp32, as sums of a few bf16 gradients are exact, whatever their order.
LIVE = {"dtype": "float32", "final_merge_batches": 2}
# With rank 32 some A and B have 4,096 values, whose moments bitsandbytes quantizes; a checkpoint gathers the moments.
EIGHT_BITS = {"method": "qlora", "optimizer": "adamw-8bit", "rank": 32, "dtype": "float32", "save_every": 1}


@pytest.mark.parametrize(
    ("changes", "size", "local"),
    [
        pytest.param(LIVE, 4, 2, id="live"),
        pytest.param(EIGHT_BITS, 4, 2, id="qlora"),
        pytest.param(LIVE, 2, 1, id="replicas-of-one", marks=only_long),
    ],
)
def test_machines_with_replicas_end_with_the_bits_of_one_process(make_base, pairs, tmp_path, changes, size, local):
    if changes == EIGHT_BITS:
        pytest.importorskip("bitsandbytes")
        pytest.importorskip("peft")
    settings = {
        "base": str(make_base(num_hidden_layers=1, intermediate_size=128)), "data": str(pairs), "steps": 2,
        "gradient_accumulation": 5, "clip_norm": 0.1, "heldout_fraction": 0.05, "evaluate_every": 0, "save_every": 0,
        "batch_size": 1, **changes,
    }  # fmt: skip
    tuned(settings, str(tmp_path / "one"))
    run_ranks(size, tuned_on_machines, local, settings, str(tmp_path / "several"))
    assert_same(tmp_path / "one", tmp_path / "several")
    runtime = json.loads((tmp_path / "several" / "manifest.json").read_text())["runtime"]
    assert (runtime["world_size"], runtime["replicas"]) == (size, 2)


def test_each_machine_holds_a_replica_where_that_fits_and_places_are_known():
    found = run_ranks(4, laid_out, [(2, False, False), (4, False, False), (2, True, False), (2, False, True)])
    two_machines = [layouts[0] for _, (layouts, _) in sorted(found.items())]
    assert [each[:2] for each in two_machines] == [
        ([0, 1], [0, 2]), ([0, 1], [1, 3]), ([2, 3], [0, 2]), ([2, 3], [1, 3]),
    ]  # fmt: skip
    assert all(0.4 < share < 0.6 for *_, share in two_machines)
    for layouts, told in found.values():
        for mesh, across, share in layouts[1:]:  # one machine, unknown places, too little memory in one place
            assert (mesh, across) == ([0, 1, 2, 3], [])
            assert share < 0.3
        assert "lora_B is not the same in all processes" in told  # a replica with one other bit
        assert "ranks 2, 3 have other bits than rank 0" in told


def test_a_replica_takes_at_most_half_of_the_memory(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    half = machine.memory_bytes() // 2
    assert [count_replicas(half - 2 * 100 + more, 100, 8, "cpu") for more in (0, 1)] == [4, 1]
    assert count_replicas(0, 0, 3, "cpu") == 1  # machines with different numbers of processes
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert count_replicas(0, 0, 8, "cpu") == 1
