"""State shared by the routes (model, engine, queue), image decoding, and cancellation when a client disconnects.

Input from clients is not trusted: format and dimensions are checked from the header before an image is decoded. JPEG,
PNG, WebP, GIF, BMP, TIFF and PPM are accepted, recognized by content and not by the declared type. CMYK is converted to
RGB, 16-bit grayscale keeps the upper 8 bits, the EXIF orientation is applied, only the first frame of an animation is
used, and transparency is dropped. Calibration treats images in the same way, with the same code (`Preprocessing`).

Work for a client that has disconnected is cancelled. A client that has closed only its sending side counts as
disconnected too, as with most servers, since the server cannot tell the two apart.
"""

from __future__ import annotations

import asyncio
import io
import logging
import threading
import time
import warnings
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from fastapi import Request

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.vision.preprocessing import Preprocessing
from serving.config import VisionConfig
from serving.http.problems import Problem, overloaded
from serving.http.server import Lifecycle
from serving.http.service import Proof
from serving.vision.batcher import Batcher, Done, VisionMetrics
from serving.vision.engine import Engine, ServedModel

logger = logging.getLogger(__name__)
T = TypeVar("T")
# Accepted formats: not those whose decoder starts another program (EPS), nor rare ones with little-tested decoders.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


@dataclass(frozen=True, slots=True)
class ReadImage:
    """A decoded and preprocessed image."""

    pixels: np.ndarray  # (3, H, W) float32, normalized
    decode_s: float  # time to decode, seconds
    preprocess_s: float  # time to resize, crop and normalize, seconds


@dataclass
class VisionState:
    """A served model and everything that its routes need."""

    model: ServedModel
    engine: Engine
    config: VisionConfig
    proof: Proof  # the validation that applies
    metrics: VisionMetrics
    lifecycle: Lifecycle
    batcher: Batcher  # runs the engine
    decoders: ThreadPoolExecutor  # threads that decode and preprocess images
    decoding: int = 0  # number of images being decoded or waiting to be

    def require_ready(self) -> None:
        """Raise a `Problem` while the service is draining."""
        if not self.lifecycle.accepting:
            raise Problem(
                503, "not_ready", "the service is shutting down", "use another instance", {"Retry-After": "5"}
            )

    async def decode(self, images: Sequence[bytes]) -> list[ReadImage]:
        """Decode and preprocess the images of a request, outside the event loop.

        Raises:
            Problem: an image cannot be used, or too many are waiting.
        """
        if self.decoding + len(images) > self.config.queue:
            self.metrics.shed.labels("decoders").inc()
            raise overloaded("too many images are waiting to be decoded")
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
        """Run the engine: (n, 3, H, W) float32 -> (n, C) float32. Raises the errors of `Batcher.submit`."""
        try:
            return await self.batcher.submit(pixels, self.config.request_timeout_s)
        except asyncio.CancelledError:
            self.metrics.shed.labels("disconnected").inc()
            raise

    async def answer(self, images: Sequence[bytes]) -> tuple[list[ReadImage], Done]:
        """Decode, preprocess and run the images of a request. Raises the errors of `decode` and `run`."""
        read = await self.decode(images)
        return read, await self.run(np.stack([image.pixels for image in read]))

    def close(self) -> None:
        """Process everything that is waiting, then end the threads."""
        self.batcher.close()
        self.decoders.shutdown()

    def _decoded(self, count: int) -> None:
        self.decoding -= count

    def _decode(self, images: Sequence[bytes], gone: threading.Event) -> list[ReadImage]:
        # Decode the images of a request in a thread; stops when `gone` is set, since the client has disconnected.
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
    """Await `work` and return its result, or cancel it if the client disconnects.

    The request's body must have been read.

    Raises:
        Problem: the client disconnected; this response is never sent.
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


def read_image(data: bytes, preprocessing: Preprocessing, max_pixels: int) -> ReadImage:
    """Decode and preprocess one image.

    Args:
        data: the bytes of the image file.
        preprocessing: the export's preprocessing.
        max_pixels: largest width times height, before and after resizing.

    Raises:
        Problem: 400, 413 or 422, the image cannot be used; no other exception is raised, whatever the bytes are.
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise Problem(400, "empty_image", "the image has no bytes", "send the file's content")
    started = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                _check_size(image.size, preprocessing, max_pixels)
                image.load()
                decoded = time.perf_counter()
                pixels = preprocessing.image_to_array(image)
    except Image.DecompressionBombError as error:
        raise _too_many(max_pixels) from error
    except UnidentifiedImageError as error:
        what, fix = "these bytes are not an image that can be read", f"send one of {', '.join(FORMATS)}"
        raise Problem(400, "not_an_image", what, fix) from error
    except ConfigurationError as error:
        raise Problem(422, "unusable_image", error.what, error.fix) from error
    except Problem:
        raise
    except Exception as error:  # on malicious files decoders raise anything: ValueError, struct.error, KeyError, ...
        logger.debug("an image could not be decoded", exc_info=error)
        raise Problem(400, "damaged_image", "the image is damaged or cut off", "send the whole file") from error
    return ReadImage(pixels, decoded - started, time.perf_counter() - decoded)


def _check_size(size: tuple[int, int], preprocessing: Preprocessing, max_pixels: int) -> None:
    # Refuse an image that is empty or too large, before or after resizing.
    short, long = min(size), max(size)
    if short < 1:
        raise Problem(400, "no_pixels", "the image has no pixels", "send an image that has")
    if short * long > max_pixels:
        raise _too_many(max_pixels)
    # A thin strip may become huge when its shorter side is resized to the model's input. The EXIF orientation may swap
    # width and height, so both orders are checked.
    grown = (preprocessing.resized(*size), preprocessing.resized(*reversed(size)))
    if max(height * width for height, width in grown) > max_pixels:
        what = f"{size[0]} x {size[1]} pixels would be resized to more than {max_pixels}"
        raise Problem(413, "image_too_thin", what, "crop it")


def _too_many(max_pixels: int) -> Problem:
    return Problem(413, "too_many_pixels", f"the image has more than {max_pixels} pixels", "send a smaller one")
