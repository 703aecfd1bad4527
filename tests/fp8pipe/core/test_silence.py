"""A process that is cut off, or that no longer hears from another one, ends with one error."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
import time
from datetime import timedelta

import pytest
from relay import Relay
from torch.distributed import PrefixStore, TCPStore

from fp8pipe.core import launch, rank_store, silence
from fp8pipe.core.errors import OutOfMemoryError
from fp8pipe.core.launch import RankContext, report_failure
from fp8pipe.core.rank_store import Heartbeats
from fp8pipe.core.silence import SilenceWatch


@pytest.fixture
def store():
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def ended(monkeypatch):
    """Exit codes of the processes that would have ended; time runs twenty times faster."""
    codes = []
    monkeypatch.setattr(silence.os, "_exit", codes.append)
    monkeypatch.setattr(silence, "_TICK_S", 0.05)
    monkeypatch.setattr(rank_store, "_HEARTBEAT_S", 0.05)
    monkeypatch.setattr(silence, "SILENCE_S", 1.0)
    monkeypatch.setattr(launch, "_printers", [lambda error: logging.error("%s", error)])
    return codes


@contextlib.contextmanager
def watch(rank, size, store):
    needed = range(size) if rank == 0 else (0, rank)
    with (
        Heartbeats(PrefixStore("run", store), rank, needed) as heartbeats,
        SilenceWatch(RankContext(rank, size, 0, store), heartbeats, needed) as made,
    ):
        yield made


def heartbeats_of(rank, store):
    return Heartbeats(PrefixStore("run", store), rank, [])


def heard(rank, *watches):
    """Waits until these have heard of a rank, whose silence is then measured from its last heartbeat."""
    until = time.monotonic() + 30
    while not all(one._heartbeats.last(rank) for one in watches):
        assert time.monotonic() < until
        time.sleep(0.05)


def wait_for(codes, count):
    until = time.monotonic() + 30
    while len(codes) < count and time.monotonic() < until:
        time.sleep(0.05)


def test_a_process_to_which_the_store_no_longer_answers_says_so_and_ends(store, ended, caplog, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    other, relay = heartbeats_of(0, store), Relay(store.port)
    client = TCPStore("127.0.0.1", relay.port, wait_for_workers=False, timeout=timedelta(seconds=1))
    with watch(1, 2, client):
        time.sleep(0.5)
        relay.cut()
        wait_for(ended, 1)
        relay.close()
    other.stop()
    assert set(ended) == {130}
    assert caplog.text.count("cut off from the others of this run for 1 s") == 1
    assert "10.0.0.1:29500, does not answer" in caplog.text
    assert "rank 1 of 2" in caplog.text


def test_a_process_whose_store_is_gone_does_not_wait_as_long(store, ended, caplog, monkeypatch):
    monkeypatch.setattr(silence, "GRACE_S", 0.2)
    monkeypatch.setattr(silence, "SILENCE_S", 600.0)
    relay = Relay(store.port)
    with watch(1, 2, TCPStore("127.0.0.1", relay.port, wait_for_workers=False)):
        time.sleep(0.3)
        relay.close()
        wait_for(ended, 1)
    assert set(ended) == {130}
    assert caplog.text.count("the other processes of this run are gone") == 1


def test_the_error_of_a_process_that_is_cut_off_is_printed(store, monkeypatch):
    monkeypatch.setattr(launch.atexit, "register", lambda *call: None)
    monkeypatch.setattr(launch, "_end_after", lambda seconds, exit_code: None)
    monkeypatch.setattr(launch, "GRACE_S", 0.2)
    relay = Relay(store.port)
    client = TCPStore("127.0.0.1", relay.port, wait_for_workers=False)
    relay.cut()
    error = OutOfMemoryError("no memory")
    assert report_failure(RankContext(1, 2, 1, client), error, 15) == (error, 15)
    relay.close()


def test_of_the_processes_that_miss_another_one_prints_its_rank_and_machine(store, ended, caplog):
    lost = heartbeats_of(0, store)
    with watch(1, 3, store.clone()) as one, watch(2, 3, store.clone()) as two:
        one.hosts = two.hosts = ["b", "a", "a"]
        heard(0, one, two)
        lost.stop()
        wait_for(ended, 4)  # each of two ends as soon as the error is printed, or else after a while
    assert set(ended) == {130}
    assert caplog.text.count("rank 0 on b of this run: no heartbeat for 1 s") == 1
    assert RankContext(1, 3, 0, store).failed()[1] == 130


def test_the_first_process_misses_every_other_one_and_the_others_only_the_first(store, ended, caplog):
    main = heartbeats_of(0, store)
    lost = heartbeats_of(2, store)
    with watch(1, 3, store.clone()) as other:
        heard(0, other)
        lost.stop()
        with watch(0, 3, store.clone()) as first:
            first.hosts = ["a", "a", "b"]
            wait_for(ended, 1)
            assert RankContext(0, 3, 0, store).failed() == (0, 130)
    main.stop()
    assert caplog.text.count("rank 2 on b of this run: no heartbeat for 1 s") == 1
    assert "rank 1" not in caplog.text


def test_a_process_that_has_not_yet_sent_a_heartbeat_has_as_long_as_it_takes_to_meet(store, ended, caplog, monkeypatch):
    monkeypatch.setattr(silence, "MEETING", timedelta(seconds=2))
    with watch(0, 2, store):
        time.sleep(1.5)
        assert not ended
        wait_for(ended, 1)
    assert set(ended) == {130}
    assert caplog.text.count("rank 1 of this run: no heartbeat for 2 s") == 1


def test_a_process_that_could_not_listen_takes_nobody_for_silent(store, ended):
    """Code in C that keeps the interpreter's lock stops all threads of Python."""
    other = heartbeats_of(1, store)
    with watch(0, 2, store.clone()):
        for _ in range(3):  # which thread is the first afterwards is a matter of chance
            time.sleep(0.3)
            ctypes.PyDLL(None).usleep(1_200_000)  # keeps the lock, unlike functions of a CDLL
    other.stop()
    assert not ended


def test_after_the_run_no_heartbeat_is_expected(store, ended):
    other = heartbeats_of(1, store)
    before = set(threading.enumerate())
    with watch(0, 2, store.clone()):
        time.sleep(0.3)
    assert set(threading.enumerate()) == before
    other.stop()
    assert not ended
