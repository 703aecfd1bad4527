"""What the routes share: the model, its engine and queue, and the threads that decode."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from serving.http.config import ServeConfig
from serving.http.problems import Problem
from serving.http.server import Lifecycle
from serving.vision.batcher import Batcher, Done
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
    config: ServeConfig
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
        self.decoding += len(images)
        try:
            return await asyncio.get_running_loop().run_in_executor(self.decoders, self._decode, images)
        except Problem as problem:
            self.metrics.decode_errors.labels(problem.code).inc()
            raise
        finally:
            self.decoding -= len(images)

    async def run(self, pixels: np.ndarray) -> Done:
        """The engine's outputs (n, C) for (n, 3, H, W)."""
        return await self.batcher.submit(pixels, self.config.request_timeout_s)

    def close(self) -> None:
        """Finish what waits, and end the threads."""
        self.batcher.close()
        self.decoders.shutdown()

    def _decode(self, images: Sequence[bytes]) -> list[ReadImage]:
        found = []
        for index, data in enumerate(images):
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
