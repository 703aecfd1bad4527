"""The batcher runs the sizes that were proven and no others, in time, and counts what it does."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest

from serving.http.problems import Problem
from serving.vision.batcher import Batcher, VisionMetrics


class Engine:
    """Remembers the batches it ran; while `go` is not set, it waits in the first one."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.begun, self.go = threading.Event(), threading.Event()
        self.begun_at: list[float] = []

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        self.begun_at.append(time.monotonic())
        self.batches.append(pixels[:, 0].tolist())
        self.begun.set()
        assert self.go.wait(30)
        return pixels * 2


def images(*values: float) -> np.ndarray:
    return np.array(values, np.float32)[:, None]


def batcher(engine: Engine, sizes: tuple[int, ...], max_wait_s: float = 0.0, capacity: int = 100) -> Batcher:
    return Batcher([engine], sizes, max_wait_s=max_wait_s, capacity=capacity, metrics=VisionMetrics())


def counted(found: Batcher, name: str, **labels: str) -> float:
    return found._metrics.registry.get_sample_value(f"fp8pipe_{name}", labels) or 0.0


@pytest.mark.parametrize(
    ("sizes", "waiting", "expected"),
    [
        ((1, 2, 4), 3, [2, 1]), ((1, 2, 4), 7, [4, 2, 1]), ((1, 2, 4), 8, [4, 4]), ((1, 4), 3, [1, 1, 1]),
        ((1, 8), 9, [8, 1]), ((1,), 3, [1, 1, 1]), ((1, 2, 4, 8), 15, [8, 4, 2, 1]),
    ],
)  # fmt: skip
def test_only_proven_sizes_run_and_what_is_left_over_keeps_its_place(sizes, waiting, expected):
    engine = Engine()
    found = batcher(engine, sizes)

    async def scene():
        first = asyncio.create_task(found.submit(images(-1), 30))
        await asyncio.to_thread(engine.begun.wait, 30)
        rest = asyncio.create_task(found.submit(images(*range(waiting)), 30))
        await asyncio.sleep(0)
        assert counted(found, "queue_depth") == waiting
        engine.go.set()
        return await first, await rest

    first, rest = asyncio.run(scene())
    found.close()
    assert [len(batch) for batch in engine.batches] == [1, *expected]
    assert [value for batch in engine.batches[1:] for value in batch] == list(range(waiting))
    assert rest.outputs[:, 0].tolist() == [2 * value for value in range(waiting)]
    assert first.outputs[:, 0].tolist() == [-2]
    assert counted(found, "images_total") == waiting + 1
    assert counted(found, "queue_depth") == 0
    assert counted(found, "batch_size_sum") == waiting + 1
    assert (
        counted(found, "batch_size_count")
        == counted(found, "stage_seconds_count", stage="inference")
        == 1 + len(expected)
    )
    assert counted(found, "stage_seconds_count", stage="queue") == 2


def test_images_of_several_requests_share_a_batch():
    engine = Engine()
    found = batcher(engine, (1, 2, 4))

    async def scene():
        first = asyncio.create_task(found.submit(images(-1), 30))
        await asyncio.to_thread(engine.begun.wait, 30)
        rest = [asyncio.create_task(found.submit(images(value), 30)) for value in (1, 2, 3, 4)]
        await asyncio.sleep(0)
        engine.go.set()
        return [done.outputs[0, 0] for done in await asyncio.gather(first, *rest)]

    assert asyncio.run(scene()) == [-2, 2, 4, 6, 8]
    found.close()
    assert engine.batches == [[-1], [1, 2, 3, 4]]


def test_a_lonely_image_waits_for_company():
    engine = Engine()
    engine.go.set()
    found = batcher(engine, (1, 2), max_wait_s=0.4)

    async def scene():
        started = time.monotonic()
        return await found.submit(images(1), 30), engine.begun_at[0] - started

    alone, waited = asyncio.run(scene())
    found.close()
    assert waited >= 0.4
    assert alone.queue_s >= 0.4
    assert engine.batches == [[1]]


def test_a_full_batch_waits_for_nothing():
    """If it waited the 60 seconds, its own 30 would be over and it would be refused: no time is measured."""
    engine = Engine()
    engine.go.set()
    found = batcher(engine, (1, 2), max_wait_s=60)
    answer = asyncio.run(found.submit(images(1, 2), 30))
    found.close()
    assert answer.queue_s < 30
    assert engine.batches == [[1, 2]]


def test_company_that_comes_in_time_is_taken_along():
    engine = Engine()
    engine.go.set()
    found = batcher(engine, (1, 2), max_wait_s=20)

    async def scene():
        one = asyncio.create_task(found.submit(images(1), 30))
        await asyncio.sleep(0.05)
        await asyncio.wait_for(asyncio.gather(one, found.submit(images(2), 30)), 15)

    asyncio.run(scene())
    found.close()
    assert engine.batches == [[1, 2]]


def test_what_waited_too_long_is_given_up_and_what_has_begun_is_not():
    engine = Engine()
    found = batcher(engine, (1,))

    async def scene():
        begun = asyncio.create_task(found.submit(images(1, 2), 0.1))  # its first image runs before the deadline
        await asyncio.to_thread(engine.begun.wait, 30)
        late = asyncio.create_task(found.submit(images(3, 4), 0.1))
        patient = asyncio.create_task(found.submit(images(5), 30))
        left = asyncio.create_task(found.submit(images(6), 30))
        await asyncio.sleep(0.2)
        left.cancel()
        engine.go.set()
        with pytest.raises(Problem) as given_up:
            await late
        return given_up.value.status, await begun, await patient

    status, begun, patient = asyncio.run(scene())
    found.close()
    assert status == 503
    assert begun.outputs[:, 0].tolist() == [2, 4]
    assert patient.outputs[0, 0] == 10
    assert engine.batches == [[1], [2], [5]]
    assert counted(found, "shed_total", reason="deadline") == 1
    assert counted(found, "images_total") == 3


def test_the_queue_is_filled_to_its_last_place():
    engine = Engine()
    found = batcher(engine, (1,), capacity=3)

    async def scene():
        first = asyncio.create_task(found.submit(images(0), 30))
        await asyncio.to_thread(engine.begun.wait, 30)
        two = asyncio.create_task(found.submit(images(1, 2), 30))
        one = asyncio.create_task(found.submit(images(3), 30))
        await asyncio.sleep(0)
        with pytest.raises(Problem) as full:
            await found.submit(images(4), 30)
        with pytest.raises(Problem) as never:
            await found.submit(images(*range(4)), 30)
        engine.go.set()
        await asyncio.gather(first, two, one)
        return full.value.status, never.value.status

    assert asyncio.run(scene()) == (503, 413)
    found.close()
    assert counted(found, "shed_total", reason="full") == 1


def test_a_failing_engine_fails_the_whole_batch_and_no_more():
    calls = []

    def run(pixels):
        calls.append(len(pixels))
        if len(calls) == 2:
            raise ValueError("once")
        return pixels

    begun, go = threading.Event(), threading.Event()

    def waits(pixels):
        begun.set()
        assert go.wait(30)
        return run(pixels)

    found = Batcher([waits], (1, 2), max_wait_s=0, capacity=9, metrics=VisionMetrics())

    async def scene():
        tasks = [asyncio.create_task(found.submit(images(0), 30))]
        await asyncio.to_thread(begun.wait, 30)
        tasks += [asyncio.create_task(found.submit(images(value), 30)) for value in (1, 2, 3)]
        await asyncio.sleep(0)
        go.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    answers = asyncio.run(scene())
    found.close()
    assert [isinstance(answer, ValueError) for answer in answers] == [False, True, True, False]
    assert calls == [1, 2, 1]
    assert counted(found, "images_total") == 2
