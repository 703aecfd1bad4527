"""Sharing work through a store: every item once, and lost processes replaced."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

import pytest
from relay import Relay
from torch.distributed import TCPStore

from fp8pipe.core import launch, rank_store, silence, work
from fp8pipe.core.launch import RankContext
from fp8pipe.core.rank_store import Heartbeats, delete_bytes, get_bytes, put_bytes, with_prefix
from fp8pipe.core.work import Item, Job, LocalPool, StorePool, assist

TIMEOUT_S = 2.0


@pytest.fixture
def store() -> TCPStore:
    """A store that this process hosts; other ranks are threads with connections of their own."""
    return TCPStore("localhost", 0, is_master=True, wait_for_workers=False)


@pytest.fixture(autouse=True)
def short_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "HEARTBEAT_TIMEOUT_S", TIMEOUT_S)


@pytest.fixture
def threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(3)


def squares(job: Job) -> Item:
    return lambda number: f"{number}: {number * number} {job.name} {len(job.payload)}".encode()


def start(store: TCPStore, rank: int, begin: Callable[[Job], Item], threads: ThreadPoolExecutor) -> Future[None]:
    return threads.submit(assist, RankContext(rank, 3, rank, store.clone()), lambda: begin)


def test_a_store_keeps_values_of_any_size(store: TCPStore) -> None:
    for size in (0, 1, (4 << 20) + 1, 20 << 20):  # one value may have at most 8 MiB
        value = bytes([size % 251]) * size
        put_bytes(store, f"key {size}", value)
        assert get_bytes(store, f"key {size}") == value
        delete_bytes(store, f"key {size}")
        assert not any(store.check([f"key {size}{part}"]) for part in ("", "/0", "/1", "/4"))


def test_items_of_all_jobs_are_computed_once_and_equal_those_of_one_process(
    store: TCPStore, threads: ThreadPoolExecutor
) -> None:
    jobs = [Job("first", 12, b"payload"), Job("empty", 0, b""), Job("second", 7, b"x" * (9 << 20))]
    every = threading.Barrier(3, timeout=20)  # all three compute their first items at the same time
    computed: list[tuple[str, str, int]] = []

    def rank(name: str) -> Callable[[Job], Item]:
        def begin(job: Job) -> Item:
            item = squares(job)

            def compute(number: int) -> bytes:
                if name not in {by for by, _, _ in computed}:
                    every.wait()
                computed.append((name, job.name, number))
                return item(number)

            return compute

        return begin

    helpers = [start(store, number, rank(f"rank {number}"), threads) for number in (1, 2)]
    with StorePool(RankContext(0, 3, 0, store)) as pool:
        found = [sorted(pool.results(job, rank("rank 0")(job))) for job in jobs]
    assert [helper.result(20) for helper in helpers] == [None, None]
    assert found == [sorted(LocalPool().results(job, squares(job))) for job in jobs]
    assert {by for by, _, _ in computed} == {"rank 0", "rank 1", "rank 2"}
    expected = [["first", number] for number in range(12)] + [["second", number] for number in range(7)]
    assert sorted(which for _, *which in computed) == expected
    values = ["payload", *(f"{kind}/{number}" for kind in ("result", "done") for number in range(3))]  # of all ranks
    part = with_prefix("fp8pipe/work", store)
    assert not any(part.check([f"job/0/{value}{end}"]) for value in values for end in ("", "/0"))


@pytest.mark.parametrize("says_so", [True, False])
def test_rank_0_computes_the_items_of_a_lost_process(
    store: TCPStore, caplog: pytest.LogCaptureFixture, says_so: bool
) -> None:
    lost = with_prefix("fp8pipe/work", store.clone())
    lost.add("job/0/next", 1)  # item 0 is taken by a process that sends no heartbeat
    if says_so:
        lost.set("job/0/taken/0", "1")
    job, began = Job("work", 3, b""), time.monotonic()
    with StorePool(RankContext(0, 2, 0, store)) as pool:
        found = list(pool.results(job, squares(job)))
    assert [number for number, _ in found] == [1, 2, 0]
    assert time.monotonic() - began >= TIMEOUT_S
    assert "item 0 of work is lost" in caplog.text


def test_a_slow_process_is_not_taken_for_a_lost_one(store: TCPStore, threads: ThreadPoolExecutor) -> None:
    begun = threading.Event()

    def slow(number: int) -> bytes:
        begun.set()
        time.sleep(TIMEOUT_S + 1)
        return b"slow"

    def quick(number: int) -> bytes:
        begun.wait(20)
        return b"quick"

    helper = start(store, 1, lambda job: slow, threads)
    with StorePool(RankContext(0, 2, 0, store)) as pool:
        assert sorted(value for _, value in pool.results(Job("work", 2, b""), quick)) == [b"quick", b"slow"]
    helper.result(20)


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Exit codes of the processes that would have ended; they wait one second for heartbeats."""
    codes: list[int] = []
    monkeypatch.setattr(silence.os, "_exit", codes.append)
    monkeypatch.setattr(silence, "_TICK_S", 0.05)
    monkeypatch.setattr(rank_store, "_HEARTBEAT_S", 0.05)
    monkeypatch.setattr(silence, "SILENCE_S", 1.0)
    monkeypatch.setattr(silence, "MEETING", timedelta(seconds=1))
    monkeypatch.setattr(silence, "GRACE_S", 1.0)
    monkeypatch.setattr(launch, "_printers", [lambda error: logging.error("%s", error)])
    return codes


def wait_for(codes: list[int]) -> None:
    until = time.monotonic() + 30
    while not codes and time.monotonic() < until:
        time.sleep(0.05)


def test_a_rank_that_computes_ends_when_rank_0_sends_no_heartbeat(
    store: TCPStore, threads: ThreadPoolExecutor, ended: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    part, over = with_prefix("fp8pipe/work", store), threading.Event()
    put_bytes(part, "job/0/payload", b"")
    part.set("job/0", '{"name": "work", "count": 1}')  # and rank 0 is gone

    def compute(number: int) -> bytes:
        over.wait(30)
        return b""

    helper = start(store, 1, lambda job: compute, threads)
    wait_for(ended)
    over.set()
    part.set("end", "")
    helper.result(20)
    assert set(ended) == {130}
    assert caplog.text.count("rank 0 of this run: no heartbeat for 1 s") == 1


@pytest.mark.parametrize(("rank", "jobs"), [(0, 1), (0, 2), (1, 0)])
def test_a_process_that_is_cut_off_from_the_store_ends_with_an_error(
    rank: int,
    jobs: int,
    store: TCPStore,
    threads: ThreadPoolExecutor,
    ended: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    relay = Relay(store.port)
    place = RankContext(rank, 2, 0, TCPStore("127.0.0.1", relay.port, wait_for_workers=False))
    job = Job("work", 1, b"")

    def computed() -> None:
        with StorePool(place) as pool:
            for _ in range(jobs - 1):
                list(pool.results(job, squares(job)))
                relay.cut()  # while it needs the store for nothing
            list(pool.results(job, lambda number: relay.cut() or b""))

    def assisted() -> None:
        with_prefix("fp8pipe/work", store).set("heartbeat/0", "1")
        assist(place, lambda: relay.cut() or squares)

    helper = threads.submit(computed if rank == 0 else assisted)
    wait_for(ended)
    relay.close()
    helper.exception(20)
    assert set(ended) == {130}
    assert caplog.text.count("cut off from the others of this run for 1 s") == 1


def test_a_pool_that_is_cut_off_after_its_work_ends_without_an_error(
    store: TCPStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "_PARTING_S", 0.5)
    relay = Relay(store.port)
    place = RankContext(0, 2, 0, TCPStore("127.0.0.1", relay.port, wait_for_workers=False))
    with StorePool(place) as pool:
        assert len(list(pool.results(Job("work", 1, b""), squares(Job("work", 1, b""))))) == 1
        relay.cut()
    relay.close()
    assert "their store has not answered for 1 s" in caplog.text


def test_a_pool_without_a_store_ends_without_an_error(caplog: pytest.LogCaptureFixture) -> None:
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    client = store.clone()
    with StorePool(RankContext(0, 2, 0, client)) as pool:
        assert [number for number, _ in pool.results(Job("work", 1, b""), squares(Job("work", 1, b"")))] == [0]
        del store
    assert "could not be told" in caplog.text


def test_heartbeats_leave_no_thread(store: TCPStore) -> None:
    before = set(threading.enumerate())
    heartbeats = Heartbeats(store, 0, [1])
    assert set(threading.enumerate()) - before
    heartbeats.stop()
    assert set(threading.enumerate()) == before
