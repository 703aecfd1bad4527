"""What processes owe each other: turns, agreement, and whole tensors."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from rank_work import compared, given_up, sharded_and_back, shares, spilled, turns
from ranks import run_ranks

from fp8pipe.core.launch import RankContext
from pipeline.falqon.base_files import RECORD
from pipeline.finetune.checkpoint import RUN
from pipeline.finetune.distributed.group import _connected

SVD, QLORA = {"initialisation": "randomized-svd"}, {"method": "qlora"}  # the first needs no losses


def test_a_difference_between_processes_is_an_error_that_names_it_in_every_process():
    for found in run_ranks(2, compared).values():
        assert found[0] == found[2] == ""
        assert found[1].startswith("10: the configuration differs between the processes of this run")
        assert "rank 1 has" in found[1]
        assert found[3].startswith("14: layer.lora_B is not the same in all processes")  # a bit of one value
        assert "ranks 1 have" in found[3]


def test_the_main_process_is_the_first_whose_turn_it_is(tmp_path):
    run_ranks(3, turns, str(tmp_path / "log"))
    log = (tmp_path / "log").read_text()
    for run in (log[:3], log[3:]):
        assert sorted(run) == ["0", "1", "2"]
        assert run[0] == "0"


def test_a_process_that_waits_learns_who_failed_and_no_other_run_follows():
    found = run_ranks(2, given_up)
    again = "InterruptedRunError: an earlier run of this process failed"
    assert found == {
        0: ["IndexError: list index out of range", again],
        1: ["InterruptedRunError: rank 0 has failed", again],
    }


def test_processes_connect_within_minutes_and_then_may_wait_for_longer(monkeypatch):
    """gloo waits for as long to connect as for any operation later, if it is not told otherwise."""
    begun, init = [], dist.init_process_group
    monkeypatch.setattr(
        dist, "init_process_group", lambda *args, **options: begun.append(options["timeout"]) or init(*args, **options)
    )
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with _connected(RankContext(0, 1, 0, store), "cpu", store):
        waits = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout
    assert (begun, waits) == ([timedelta(minutes=5)], timedelta(minutes=30))


def test_tensors_of_any_shape_are_whole_again_and_take_values():
    shapes = [((8, 3), "float32"), ((7, 5), "uint8"), ((2, 4), "bfloat16"), ((1,), "float32"), ((9,), "uint8")]
    found = run_ranks(4, sharded_and_back, shapes)
    assert all(whole and assigned for one in found.values() for _, whole, assigned in one)
    # Four processes: shares are rounded up, so the last ones have fewer rows, or none.
    assert [[rows for rows, _, _ in found[rank]] for rank in range(4)] == [
        [2, 2, 1, 1, 3], [2, 2, 1, 0, 3], [2, 2, 0, 0, 3], [2, 1, 0, 0, 0],
    ]  # fmt: skip


def test_the_codes_that_are_written_to_collect_them_are_counted_in_advance(tmp_path):
    (tmp_path / RECORD).touch()  # as if rank 0 had converted the model
    for before, written, after in run_ranks(2, spilled, str(tmp_path)).values():
        assert before == written > 10_000
        assert after == 0  # they would be replaced


@pytest.mark.parametrize(("size", "family", "how"), [(2, "llama", SVD), (4, "mixtral", SVD), (2, "llama", QLORA)])
def test_each_process_holds_its_share_of_the_bytes(tmp_path, size, family, how):
    if how == QLORA:
        pytest.importorskip("bitsandbytes")
        pytest.importorskip("peft")
    for name in (RECORD, RUN):
        (tmp_path / name).touch()  # as if rank 0 had prepared the run
    for held in run_ranks(size, shares, family, how, str(tmp_path)).values():
        for mine, whole in held.values():
            # Rows are divided up, and every matrix has 24 rows or more: rounded up by less than one in six.
            assert mine <= 1.17 * whole / size
            assert whole > 10_000
