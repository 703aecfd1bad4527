"""Where processes meet, and which of several failures is printed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch.distributed as dist

from fp8pipe.core import launch
from fp8pipe.core.errors import ConfigurationError, InterruptedRunError, OutOfMemoryError
from fp8pipe.core.launch import RankContext, launched, report_failure

ROOT = Path(__file__).resolve().parents[3]
# Rank 1, whose stdout cannot be written any more, waits for something that never comes.
WAITING = """
import sys, time
from torch.distributed import TCPStore
from fp8pipe.core import launch
store = TCPStore("127.0.0.1", int(sys.argv[1]))
launch._WATCH_S = launch.GRACE_S = 0.1
launch._start_to_watch(launch.RankContext(1, 2, 1, store), store.clone())
sys.stdout.close()
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def this_process_goes_on(monkeypatch):
    """None of the processes that fail ends this one."""
    monkeypatch.setattr(launch.atexit, "register", lambda *call: None)
    monkeypatch.setattr(launch, "_end_after", lambda seconds, exit_code: None)


@pytest.fixture
def places():
    """Three processes of one run."""
    store = dist.HashStore()
    return [RankContext(rank, 3, rank, store) for rank in range(3)]


def test_a_process_alone_is_not_one_of_several(monkeypatch):
    launched.cache_clear()
    for name, value in (("WORLD_SIZE", None), ("WORLD_SIZE", "1")):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        assert launched() is None
        launched.cache_clear()


def test_an_incomplete_environment_is_refused_by_name(monkeypatch):
    launched.cache_clear()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigurationError, match="WORLD_SIZE is 2") as error:
        launched()
    assert error.value.why == "missing: LOCAL_RANK, MASTER_PORT, MASTER_ADDR"


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", ""), ("WORLD_SIZE", "two"), ("MASTER_PORT", "x")])
def test_variables_that_are_no_numbers_are_refused_by_name(monkeypatch, name, value):
    launched.cache_clear()
    variables = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for one, said in (variables | {name: value}).items():
        monkeypatch.setenv(one, said)
    with pytest.raises(ConfigurationError, match="are no numbers") as error:
        launched()
    assert error.value.why == f"{name}={value!r}"


def test_only_the_first_failure_is_printed_and_its_exit_code_is_everyones(places):
    assert places[0].failed() is None
    first = OutOfMemoryError("no memory")
    assert report_failure(places[2], first, 15) == (first, 15)
    assert report_failure(places[0], ConfigurationError("another"), 10) == (None, 15)
    assert report_failure(places[1], RuntimeError("Connection closed by peer [127.0.0.1]"), 1) == (None, 15)
    assert all(place.failed() == (2, 15) for place in places)


def test_no_process_exits_before_the_error_is_printed(monkeypatch):
    """A launcher terminates the process that prints as soon as another one has exited."""
    at_exit, left = [], []
    monkeypatch.setattr(launch.atexit, "register", lambda *call: at_exit.append(call))
    store = dist.HashStore()
    report_failure(RankContext(1, 2, 1, store), OutOfMemoryError("no memory"), 15)
    report_failure(RankContext(0, 2, 0, store), ConfigurationError("another"), 10)
    monkeypatch.setattr(launch, "_leave", lambda code: left.append((threading.current_thread().name, code)))
    printer, other = (threading.Thread(target=end, args=arguments, name=name)
                      for name, (end, *arguments) in zip(("printer", "other"), at_exit, strict=True))  # fmt: skip
    other.start()
    other.join(0.5)
    assert left == []
    printer.start()
    for thread in (printer, other):
        thread.join(5)
    assert sorted(left) == [("other", 15), ("printer", 15)]


def test_a_process_exits_although_the_one_that_was_to_print_is_gone(monkeypatch):
    left = []
    monkeypatch.setattr(launch, "_leave", left.append)
    monkeypatch.setattr(launch, "GRACE_S", 0.1)
    launch.leave_after_printing(dist.HashStore(), 15, first=False)
    assert left == [15]


def test_a_process_that_tells_its_failure_again_stays_the_first_and_corrects_its_exit_code(places):
    """The Python interface tells of an error that passes through it, before the command line knows its exit code."""
    assert places[1].fail(1)
    error = MemoryError()
    assert report_failure(places[1], error, 15) == (error, 15)
    assert places[1].fail(15)
    assert report_failure(places[0], ConfigurationError("another"), 10) == (None, 15)


def test_a_process_that_waits_ends_with_the_exit_code_of_the_one_that_failed():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    RankContext(0, 2, 0, store).fail(15)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WAITING, str(store.port)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50, check=False)
    assert ended.returncode == 15, ended.stderr


@pytest.mark.parametrize(
    "error",
    [
        dist.DistNetworkError("failed to recv, got 0 bytes"),
        dist.DistBackendError("ncclRemoteError: ... a network error or a remote process exiting prematurely."),
        RuntimeError("[pair.cc:5] Broken pipe"),
    ],
)
def test_a_lost_connection_without_another_failure_is_told_as_such(places, error):
    told, code = report_failure(places[1], error, 1)
    assert isinstance(told, InterruptedRunError)
    assert code == 130
    assert "--resume" in told.fix


@pytest.mark.parametrize(
    "own",
    [
        RuntimeError("shapes do not fit"),
        dist.DistBackendError("NCCL error: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 5000"),
        dist.DistStoreError("wait timeout after 300000ms"),
    ],
)
def test_an_error_of_its_own_is_no_lost_connection(places, own):
    assert report_failure(places[0], own, 1) == (own, 1)
