"""From a client's bytes to the model's input, trusting nothing.

Size, format and pixels are read from the header before anything is decoded. JPEG, PNG, WebP, GIF, BMP, TIFF and PPM
are read, by their content and not by what the client calls them. CMYK becomes RGB, 16-bit greys keep their 8 high
bits, an EXIF orientation is applied, the first frame of an animation counts, and transparency is dropped: all as in
calibration, since the function is the same (`Preprocessing`).
"""

from __future__ import annotations

import io
import logging
import time
import warnings
from dataclasses import dataclass

import numpy as np

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.vision.preprocessing import Preprocessing
from serving.http.problems import Problem

__all__ = ["FORMATS", "ReadImage", "read_image"]

logger = logging.getLogger(__name__)

# Not those that start a program (EPS), nor rare ones whose decoders are seldom tested.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


@dataclass(frozen=True, slots=True)
class ReadImage:
    """One picture, ready."""

    pixels: np.ndarray  # (3, H, W) float32, normalized
    decode_s: float  # time to decode
    preprocess_s: float  # time to resize, crop and normalize


def read_image(data: bytes, preprocessing: Preprocessing, max_pixels: int) -> ReadImage:
    """Decode and prepare one picture: `data` are the file's bytes, `preprocessing` is the export's.

    Width times height may be `max_pixels`, before and after the resize.

    Raises:
        Problem: 400, 413 or 422; nothing else, whatever the bytes are.
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
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        if isinstance(error, Image.DecompressionBombError):
            raise _too_many(max_pixels) from error
        raise Problem(
            400, "not_an_image", "these bytes are not an image that can be read", f"send one of {', '.join(FORMATS)}"
        ) from error
    except ConfigurationError as error:
        raise Problem(422, "unusable_image", error.what, error.fix) from error
    except Problem:
        raise
    except Exception as error:  # decoders of hostile files raise anything: ValueError, struct.error, KeyError, ...
        logger.debug("an image could not be decoded", exc_info=error)
        raise Problem(400, "damaged_image", "the image is damaged or cut off", "send the whole file") from error
    return ReadImage(pixels, decoded - started, time.perf_counter() - decoded)


def _check_size(size: tuple[int, int], preprocessing: Preprocessing, max_pixels: int) -> None:
    short, long = min(size), max(size)
    if short < 1:
        raise Problem(400, "no_pixels", "the image has no pixels", "send one that has")
    if short * long > max_pixels:
        raise _too_many(max_pixels)
    side = preprocessing.resize
    # A thin strip grows: its shorter side is resized to the model's.
    if isinstance(side, int) and side * (side * long // short) > max_pixels:
        raise Problem(413, "image_too_thin", f"{size[0]} x {size[1]} pixels would be resized to more than {max_pixels}",
                      "crop it")  # fmt: skip


def _too_many(max_pixels: int) -> Problem:
    return Problem(413, "too_many_pixels", f"the image has more than {max_pixels} pixels", "send a smaller one")
