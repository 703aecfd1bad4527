"""Dynamic batching: images of several requests run together, from one bounded queue, with one thread per stream.

A thread takes the waiting images, up to the largest batch size, waits at most `max_wait_s` for more, and runs the
batch. While all threads are busy, the next batch accumulates; under load, batches are full and no time is spent
waiting. A request that does not fit into the queue is rejected at once, and one whose deadline has passed is dropped;
both are answered with 503. The event loop itself only appends to the queue.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from prometheus_client import Counter, Gauge, Histogram

from serving.http.problems import Problem, overloaded
from serving.http.telemetry import LATENCY_BUCKETS_S, HttpMetrics

logger = logging.getLogger(__name__)

_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
Run = Callable[[np.ndarray], np.ndarray]


class VisionMetrics(HttpMetrics):
    """Metrics of a vision service. Its stages are decode, preprocess, queue, and inference of a whole batch."""

    def __init__(self) -> None:
        super().__init__()
        at = self.registry
        stage = Histogram(
            "fp8pipe_stage_seconds", "Time per stage.", ("stage",), buckets=LATENCY_BUCKETS_S, registry=at
        )
        self.decode, self.preprocess, self.queue, self.inference = (
            stage.labels(name) for name in ("decode", "preprocess", "queue", "inference")
        )
        self.queue_depth = Gauge("fp8pipe_queue_depth", "Images waiting for the engine.", registry=at)
        self.batch_size = Histogram("fp8pipe_batch_size", "Images per batch.", buckets=_BATCH_BUCKETS, registry=at)
        self.images = Counter("fp8pipe_images", "Images answered.", registry=at)
        self.decode_errors = Counter(
            "fp8pipe_decode_errors", "Images that could not be decoded or used.", ("code",), registry=at
        )
        self.shed = Counter("fp8pipe_shed", "Requests rejected or dropped because of load.", ("reason",), registry=at)


@dataclass(frozen=True, slots=True)
class Done:
    """The result of one request."""

    outputs: np.ndarray  # (n, C) float32
    queue_s: float  # waiting time of its first image, seconds
    inference_s: float  # run time of the batch with its last image, seconds


@dataclass(slots=True)
class _Job:
    # One request while it waits or runs.
    pixels: np.ndarray  # (n, 3, H, W) float32
    future: asyncio.Future[Done]  # resolved in `loop`
    loop: asyncio.AbstractEventLoop
    arrived: float  # `time.monotonic()`, like the deadline
    deadline: float
    rows: list[np.ndarray | None] = field(default_factory=list)  # outputs by image; None until it has run
    left: int = 0  # number of images that have not run
    queue_s: float = -1.0  # waiting time of the first image, seconds; negative until it runs


class Batcher:
    """The queue of an engine, and the threads that run its batches.

    Args:
        runs: (n, 3, H, W) float32 -> (n, C) float32, for n in `sizes`; each is called in its own thread.
        sizes: permitted batch sizes, ascending, beginning with 1.
        max_wait_s: how long the oldest image waits for the batch to fill, seconds.
        capacity: maximum number of waiting images.
        metrics: the metrics to update.
    """

    def __init__(
        self, runs: Sequence[Run], sizes: Sequence[int], *, max_wait_s: float, capacity: int, metrics: VisionMetrics
    ) -> None:
        self._sizes, self._max_wait_s, self._capacity = tuple(sizes), max_wait_s, capacity
        self._metrics = metrics
        self._waiting: deque[tuple[_Job, int]] = deque()
        self._change = threading.Condition()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, args=(run,), name="engine", daemon=True) for run in runs]
        for thread in self._threads:
            thread.start()

    async def submit(self, pixels: np.ndarray, timeout_s: float) -> Done:
        """Run the images of one request, (n, 3, H, W) float32, n >= 1; they must start within `timeout_s`.

        Raises:
            Problem: 503, the queue is full or the deadline has passed; 413, more images than the queue can hold.
        """
        loop, now = asyncio.get_running_loop(), time.monotonic()
        count = len(pixels)
        if count > self._capacity:
            raise Problem(
                413, "too_many_images", f"{count} images, but the queue holds only {self._capacity}", "send fewer"
            )
        job = _Job(pixels, loop.create_future(), loop, now, now + timeout_s, [None] * count, count)
        with self._change:
            if len(self._waiting) + count > self._capacity:
                self._metrics.shed.labels("full").inc()
                raise overloaded("the queue is full")
            self._waiting.extend((job, row) for row in range(count))
            self._metrics.queue_depth.set(len(self._waiting))
            self._change.notify_all()
        return await job.future

    def close(self) -> None:
        """Process all waiting images, then end the threads."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self, run: Run) -> None:
        while (batch := self._gather()) is not None:
            if batch:
                self._answer(run, batch)

    def _gather(self) -> list[tuple[_Job, int]] | None:
        """Wait for the next batch, (request, image index) pairs; None after `close`, once the queue is empty."""
        largest = self._sizes[-1]
        with self._change:
            while not self._waiting:
                if self._closed:
                    return None
                self._change.wait()
            until = self._waiting[0][0].arrived + self._max_wait_s
            while len(self._waiting) < largest and not self._closed and (left := until - time.monotonic()) > 0:
                self._change.wait(left)
            alive = self._drop_dead(largest)
            size = max((size for size in self._sizes if size <= len(alive)), default=0)
            self._waiting.extendleft(reversed(alive[size:]))
            if self._waiting:
                self._change.notify_all()  # the thread of another stream may be idle
            self._metrics.queue_depth.set(len(self._waiting))
            return alive[:size]

    def _drop_dead(self, count: int) -> list[tuple[_Job, int]]:
        """Take up to `count` images from the queue; drop those whose request has ended or passed its deadline."""
        alive: list[tuple[_Job, int]] = []
        now, late = time.monotonic(), set()
        while self._waiting and len(alive) < count:
            job, row = self._waiting.popleft()
            if job.future.done() or id(job) in late:
                continue
            if now > job.deadline and job.queue_s < 0:
                late.add(id(job))
                self._metrics.shed.labels("deadline").inc()
                job.loop.call_soon_threadsafe(_resolve, job, overloaded("the engine did not process it in time"))
                continue
            alive.append((job, row))
        return alive

    def _answer(self, run: Run, batch: list[tuple[_Job, int]]) -> None:
        # Run a batch, and resolve the requests that are complete with it.
        started = time.monotonic()
        with self._change:  # the images of one request may run in several threads
            for job in {id(job): job for job, _ in batch}.values():
                if job.queue_s < 0:
                    job.queue_s = started - job.arrived
                    self._metrics.queue.observe(job.queue_s)
        first, row = batch[0]
        pixels = first.pixels[row : row + 1] if len(batch) == 1 else np.stack([job.pixels[row] for job, row in batch])
        try:
            outputs = run(pixels)
        except Exception as error:  # engines raise any type; only the requests fail, the thread continues
            logger.exception("the engine failed on a batch of %d", len(batch))
            for job, _ in batch:
                job.loop.call_soon_threadsafe(_resolve, job, error)
            return
        took_s = time.monotonic() - started
        self._metrics.inference.observe(took_s)
        self._metrics.batch_size.observe(len(batch))
        self._metrics.images.inc(len(batch))
        for (job, row), output in zip(batch, outputs, strict=True):
            job.rows[row] = output
            with self._change:
                job.left -= 1
                complete = job.left == 0
            if complete:
                job.loop.call_soon_threadsafe(_resolve, job, Done(np.stack(job.rows), job.queue_s, took_s))  # type: ignore[arg-type]


def _resolve(job: _Job, outcome: Done | Exception) -> None:
    """Set the result of a request, unless it was cancelled; runs in the event loop."""
    if job.future.done():
        return
    if isinstance(outcome, Done):
        job.future.set_result(outcome)
    else:
        job.future.set_exception(outcome)
