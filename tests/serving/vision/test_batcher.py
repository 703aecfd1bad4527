"""Several streams behind one queue: a request whose images run in many threads has its own rows, in order."""

from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest

from serving.http.problems import Problem
from serving.vision.batcher import Batcher, VisionMetrics


def _batcher(runs, sizes=(1, 2, 4), capacity=2000):
    return Batcher(runs, sizes, max_wait_s=0.0, capacity=capacity, metrics=VisionMetrics())


def _doubling(threads):
    def run(pixels):
        threads.add(threading.get_ident())
        return pixels * 2

    return run


def test_rows_of_a_request_stay_in_order_over_many_streams():
    threads: set[int] = set()
    batcher = _batcher([_doubling(threads)] * 5)

    async def scene():
        requests = [np.arange(n, dtype=np.float32)[:, None] + 100 * n for n in range(1, 40)]
        return requests, await asyncio.gather(*(batcher.submit(pixels, 30) for pixels in requests))

    requests, found = asyncio.run(scene())
    batcher.close()
    for pixels, done in zip(requests, found, strict=True):
        assert np.array_equal(done.outputs, pixels * 2)
    assert 1 <= len(threads) <= 5


def test_streams_run_at_once():
    """Each waits for the other: one stream alone would never answer."""
    meeting = threading.Barrier(2)

    def run(pixels):
        meeting.wait(30)
        return pixels

    batcher = _batcher([run, run], sizes=(1,))

    async def scene():
        await asyncio.gather(*(batcher.submit(np.zeros((1, 1), np.float32), 30) for _ in range(6)))

    asyncio.run(scene())
    batcher.close()


def test_an_engine_that_fails_answers_and_goes_on():
    calls = []

    def run(pixels):
        calls.append(len(pixels))
        if len(calls) == 1:
            raise ValueError("once")
        return pixels

    batcher = _batcher([run], sizes=(1,))

    async def scene():
        with pytest.raises(ValueError, match="once"):
            await batcher.submit(np.zeros((1, 1), np.float32), 30)
        return await batcher.submit(np.ones((1, 1), np.float32), 30)

    assert asyncio.run(scene()).outputs == 1
    batcher.close()


def test_what_waits_when_it_closes_is_answered():
    go = threading.Event()

    def run(pixels):
        assert go.wait(30)
        return pixels

    batcher = _batcher([run, run], sizes=(1,))

    async def scene():
        tasks = [asyncio.create_task(batcher.submit(np.zeros((1, 1), np.float32), 30)) for _ in range(20)]
        await asyncio.sleep(0.05)
        closing = asyncio.create_task(asyncio.to_thread(batcher.close))
        go.set()
        await closing
        return await asyncio.gather(*tasks)

    assert len(asyncio.run(scene())) == 20


def test_what_does_not_fit_the_queue_is_refused():
    begun, go = threading.Event(), threading.Event()

    def run(pixels):
        begun.set()
        assert go.wait(30)
        return pixels

    batcher = _batcher([run], sizes=(1,), capacity=3)

    async def refusal(count):
        with pytest.raises(Problem) as refused:
            await batcher.submit(np.zeros((count, 1), np.float32), 30)
        return refused.value.status

    async def scene():
        first = asyncio.create_task(batcher.submit(np.zeros((1, 1), np.float32), 30))
        await asyncio.to_thread(begun.wait, 30)
        waiting = asyncio.create_task(batcher.submit(np.zeros((3, 1), np.float32), 30))
        await asyncio.sleep(0)
        found = await refusal(4), await refusal(1)
        go.set()
        await asyncio.gather(first, waiting)
        return found

    assert asyncio.run(scene()) == (413, 503)
    batcher.close()
