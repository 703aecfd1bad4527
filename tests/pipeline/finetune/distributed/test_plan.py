"""A plan in several processes is that of each of them, and is printed once."""

from __future__ import annotations

import json

import pytest
from rank_plan import planned
from ranks import run_ranks
from tuning_config import config

from fp8pipe.core import launch
from fp8pipe.core import plan as core_plan
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.core.machine import format_bytes
from pipeline.finetune import needs
from pipeline.finetune.plan import plan_finetune

RANK, ROWS = 8, {"qkv": 64 + 2 * 32, "o": 64, "up": 2 * 96, "down": 64}
WIDTHS = {"qkv": 64, "o": 64, "up": 64, "down": 96}
LAYERS, REST = 2, 2 * (272 * 64 + 5 * 64)  # embedding (tied to the head) and five norms, bf16


@pytest.fixture
def settings(make_base, pairs):
    return {"base": str(make_base()), "data": str(pairs), "device": "cpu"}


def test_it_counts_what_each_process_holds(settings, tmp_path):
    changes = {"gradient_accumulation": 2, "update_rule": "live-both"}
    found = run_ranks(2, planned, {**settings, **changes}, str(tmp_path))
    assert found == {0: 0, 1: 0}
    assert (tmp_path / "1.out").read_text() == ""
    plan = json.loads((tmp_path / "0.out").read_text())["plan"]
    codes = LAYERS * sum((ROWS[name] + RANK) * WIDTHS[name] for name in ROWS)
    trained = LAYERS * RANK * (sum(ROWS.values()) + sum(WIDTHS[name] for name in ROWS))
    assert plan["processes"] == 2
    assert plan["sharded_weights_bytes"] == (codes + REST) // 2
    assert plan["sharded_adapter_bytes"] == 4 * 4 * trained // 2  # A and B, gradients and two moments in fp32
    assert plan["gathered_bytes"] == REST + 3 * (codes + 4 * trained) // LAYERS
    assert plan["loaded_bytes"] == 0  # the base is mapped from its files on a CPU
    assert plan["seconds"] is None
    assert any("memory is that of each process" in note for note in plan["notes"])
    assert not (tmp_path / "out.partial").exists()


QLORA = {"method": "qlora", "optimizer": "adamw-8bit"}


@pytest.mark.parametrize(
    ("changes", "frozen", "scales", "moments"),
    # Bytes per frozen weight: bf16, or NF4 with one fp32 scale for 256 8-bit scales of 64 weights; of both moments.
    [({"method": "lora"}, 2, 0, 8), (QLORA, 0.5, 1 / 64 + 4 / (64 * 256), 2)],
    ids=["lora", "qlora"],
)
def test_it_counts_what_each_process_holds_of_the_baselines(settings, changes, frozen, scales, moments, monkeypatch):
    monkeypatch.setattr(launch, "launched", lambda: launch.RankContext(0, 2, 0, None))
    imported: list[str] = []
    monkeypatch.setattr(needs, "import_module", imported.append)
    monkeypatch.setattr(needs, "resident_bytes", lambda: 10**12 * len(imported))
    plan = plan_finetune(config(**settings, gradient_accumulation=2, **changes))
    assert imported == ["peft", *(["bitsandbytes"] if scales else [])]
    assert plan.peak_memory_bytes > 10**12 * len(imported)  # measured once they are there
    weights = LAYERS * sum(ROWS[name] * WIDTHS[name] for name in ROWS)
    columns = LAYERS * (3 * 64 + 64 + 2 * 64 + 96)  # each layer has an A of its own
    trained = RANK * (columns + LAYERS * sum(ROWS.values()))
    held = (frozen * weights + REST) / 2 + scales * weights
    assert plan.facts["sharded_weights_bytes"] == pytest.approx(held, abs=0.0003 * weights)
    assert plan.facts["sharded_adapter_bytes"] == (8 + moments) * trained // 2
    assert plan.facts["gathered_bytes"] == pytest.approx(REST + 3 * (frozen * weights + 4 * trained) / LAYERS, abs=3)


@pytest.mark.parametrize("local", [1, 2])
def test_machines_have_replicas_of_all_but_8_bit_moments_and_memory_for_their_own_processes(
    settings, local, monkeypatch
):
    monkeypatch.setattr(launch, "launched", lambda: launch.RankContext(0, 2, 0, None))
    monkeypatch.setattr(core_plan, "available_bytes", lambda: 0)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    plan = plan_finetune(config(**settings, gradient_accumulation=2, **QLORA))
    weights = LAYERS * sum(ROWS[name] * WIDTHS[name] for name in ROWS)
    trained = RANK * LAYERS * (3 * 64 + 64 + 2 * 64 + 96 + sum(ROWS.values()))
    scales = 1 / 64 + 4 / (64 * 256)
    held = (0.5 * weights + REST) / local + scales * weights
    assert plan.facts["sharded_weights_bytes"] == pytest.approx(held, abs=0.0003 * weights)
    assert plan.facts["sharded_adapter_bytes"] == 8 * trained // local + 2 * trained // 2
    needed = format_bytes(local * plan.peak_memory_bytes)
    assert [one.what for one in plan.missing if one.what.startswith("memory")] == [
        f"memory: {needed} at the peak, 0 B available now"
    ]


def test_a_plan_for_one_process_has_no_shares(settings):
    facts = plan_finetune(config(**settings)).facts
    assert not {"processes", "gathered_bytes"} & facts.keys()


def test_what_several_processes_cannot_run_is_refused_by_the_plan_too(settings, monkeypatch):
    monkeypatch.setattr(launch, "launched", lambda: launch.RankContext(0, 2, 0, None))
    with pytest.raises(ConfigurationError, match="2 processes have 1 micro-batch"):
        plan_finetune(config(**settings))
