"""What the routes share: the model, its engine and queue, and the threads that decode."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from serving.http.problems import Problem
from serving.http.server import Lifecycle
from serving.vision.batcher import Batcher, Done
from serving.vision.config import VisionConfig
from serving.vision.engine import Engine
from serving.vision.images import ReadImage, read_image
from serving.vision.metrics import VisionMetrics
from serving.vision.model import ServedModel

__all__ = ["VisionState"]


@dataclass
class VisionState:
    """One served model.

    Attributes:
        decoding: images that are being decoded, or wait for it.
    """

    model: ServedModel
    engine: Engine
    config: VisionConfig
    metrics: VisionMetrics
    lifecycle: Lifecycle
    batcher: Batcher
    decoders: ThreadPoolExecutor
    decoding: int = 0

    async def decode(self, images: Sequence[bytes]) -> list[ReadImage]:
        """Decode and prepare the images of a request, off the event loop.

        Raises:
            Problem: an image cannot be used, or too many wait.
        """
        if self.decoding + len(images) > self.config.queue:
            self.metrics.shed.labels("decoders").inc()
            raise Problem(503, "overloaded", "too many images wait to be decoded", "try again in a second",
                          {"Retry-After": "1"})  # fmt: skip
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
