"""What the routes share: the model, its engine and queue, the threads that decode, and whether the client still waits.

What a client no longer waits for is given up. A client that has closed its side of the connection counts as gone, as
with most servers: on the network that is how a closed connection looks.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from fastapi import Request

from serving.http.problems import Problem, overloaded
from serving.http.server import Lifecycle
from serving.http.service import Proof
from serving.vision.batcher import Batcher, Done, VisionMetrics
from serving.vision.config import VisionConfig
from serving.vision.engine import Engine
from serving.vision.images import ReadImage, read_image
from serving.vision.model import ServedModel

__all__ = ["VisionState", "while_connected"]

T = TypeVar("T")


@dataclass
class VisionState:
    """One served model."""

    model: ServedModel
    engine: Engine
    config: VisionConfig
    proof: Proof
    metrics: VisionMetrics
    lifecycle: Lifecycle
    batcher: Batcher
    decoders: ThreadPoolExecutor
    decoding: int = 0  # images that are being decoded, or wait for it

    def require_ready(self) -> None:
        """Raises a `Problem` while the service drains."""
        if not self.lifecycle.accepting:
            raise Problem(503, "not_ready", "the service drains", "use another instance", {"Retry-After": "5"})

    async def decode(self, images: Sequence[bytes]) -> list[ReadImage]:
        """Decode and prepare the images of a request, off the event loop.

        Raises:
            Problem: an image cannot be used, or too many wait.
        """
        if self.decoding + len(images) > self.config.queue:
            self.metrics.shed.labels("decoders").inc()
            raise overloaded("too many images wait to be decoded")
        loop, gone = asyncio.get_running_loop(), threading.Event()
        self.decoding += len(images)
        work = self.decoders.submit(self._decode, images, gone)
        work.add_done_callback(lambda _: loop.call_soon_threadsafe(self._decoded, len(images)))
        try:
            return await asyncio.wrap_future(work)
        except Problem as problem:
            self.metrics.decode_errors.labels(problem.code).inc()
            raise
        except asyncio.CancelledError:
            gone.set()
            raise

    async def run(self, pixels: np.ndarray) -> Done:
        """The engine's outputs (n, C) for (n, 3, H, W)."""
        try:
            return await self.batcher.submit(pixels, self.config.request_timeout_s)
        except asyncio.CancelledError:
            self.metrics.shed.labels("disconnected").inc()
            raise

    async def answer(self, images: Sequence[bytes]) -> tuple[list[ReadImage], Done]:
        """Decode, prepare and run the images of a request. Raises as `decode`."""
        read = await self.decode(images)
        return read, await self.run(np.stack([image.pixels for image in read]))

    def close(self) -> None:
        """Finish what waits, and end the threads."""
        self.batcher.close()
        self.decoders.shutdown()

    def _decoded(self, count: int) -> None:
        self.decoding -= count

    def _decode(self, images: Sequence[bytes], gone: threading.Event) -> list[ReadImage]:
        found: list[ReadImage] = []
        for index, data in enumerate(images):
            if gone.is_set():
                return found
            try:
                image = read_image(data, self.model.preprocessing, self.config.max_pixels)
            except Problem as problem:
                if len(images) > 1:
                    problem.message = f"image {index}: {problem.message}"
                raise
            self.metrics.decode.observe(image.decode_s)
            self.metrics.preprocess.observe(image.preprocess_s)
            found.append(image)
        return found


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves. The request's body must have been read.

    Raises:
        Problem: the client has left; nobody receives it.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Problem(400, "disconnected", "the client left before the answer")
        return task.result()
    finally:
        watch.cancel()
        task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
