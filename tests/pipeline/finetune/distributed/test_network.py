"""Two machines with addresses of their own, of which one is cut off from the other in the middle of training.

A cut is silent: no connection is reset. These tests are skipped where network namespaces cannot be made, which needs
root; what a process does when it is cut off is tested without in `fp8pipe/core/test_silence.py`.
"""

from __future__ import annotations

import json

import pytest
from machines import cut_command, network, run_on, unconnected_command
from rank_work import tuned
from ranks import assert_same

SETTINGS = {
    "steps": 4, "save_every": 2, "evaluate_every": 4, "heldout_fraction": 0.3, "clip_norm": 0.1,
    "gradient_accumulation": 2,
}  # fmt: skip


@pytest.fixture
def machines():
    with network(2) as made:
        yield made


def test_processes_that_cannot_connect_say_which_variable_to_set(machines, tmp_path):
    codes = run_on(machines, unconnected_command, str(tmp_path / "out"), interface="lo")
    assert 10 in codes
    assert set(codes) <= {10, 130}  # of the second, if the launcher of the first, and the store, end before it notices
    logs = [(tmp_path / f"out-{rank}.log").read_text() for rank in (0, 1)]
    assert sum("cannot connect to each other" in log for log in logs) == 1
    assert sum("set GLOO_SOCKET_IFNAME" in log for log in logs) == 1


def test_a_cut_that_heals_in_time_changes_no_bit(machines, make_base, pairs, tmp_path):
    settings = {"base": str(make_base()), "data": str(pairs), **SETTINGS}
    assert run_on(machines, cut_command, settings, str(tmp_path / "two"), machines, 3, 2.0, 60.0) == [0, 0]
    assert (tmp_path / "two-cut").exists()
    tuned(settings, str(tmp_path / "one"))
    assert_same(tmp_path / "one", tmp_path / "two")


def test_a_cut_that_does_not_heal_ends_both_machines_with_an_error_and_loses_nothing(
    machines, make_base, pairs, tmp_path
):
    settings = {"base": str(make_base()), "data": str(pairs), **SETTINGS}
    output = tmp_path / "cut"
    assert run_on(machines, cut_command, settings, str(output), machines, 3, 0, 3.0) == [130, 130]
    logs = [(tmp_path / f"cut-{rank}.log").read_text() for rank in (0, 1)]
    errors = [json.loads(log[log.index("{\n") :])["error"] for log in logs]
    assert [log.count("error: ") for log in logs] == [1, 1]
    assert "rank 1 on " in errors[0]["what"]
    assert "no heartbeat for 3 s" in errors[0]["what"]
    assert "cut off from the others of this run for 3 s" in errors[1]["what"]
    assert "10.99.0.1:29500" in errors[1]["why"]
    assert all("--resume" in error["fix"] for error in errors)
    assert [path.name for path in (tmp_path / "cut.partial" / "checkpoints").glob("step-*")] == ["step-00000002"]
    tuned(settings, str(output), resume=True)
    tuned(settings, str(tmp_path / "whole"))
    assert_same(tmp_path / "whole", output)
