"""Images for comparisons: from a folder, from the artifact's calibration set, or random pixels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fp8pipe.core.errors import BadArtifactError
from fp8pipe.models.vision.image_folder import batches, read_image_folder
from fp8pipe.models.vision.preprocessing import Preprocessing

PROBE_IMAGES: Final = 64
MOST_IMAGES: Final = 500
_READ_AT_ONCE: Final = 64
CALIBRATION_FILE: Final = "calibration/images.safetensors"
_SEED: Final = 0


@dataclass(frozen=True, slots=True)
class ProbeImages:
    """Normalized images, and where they come from."""

    pixels: Tensor  # (N, 3, H, W) float32
    source: str  # a description of their origin, for reports


def probe_images(root: Path | None, preprocessing: Preprocessing, count: int = PROBE_IMAGES) -> ProbeImages:
    """The first images of an artifact's calibration set, or at most 16 images of random pixels if it has none.

    `root` is the artifact's directory, None for random pixels; at most `count` normalized images are returned.

    Raises:
        BadArtifactError: the calibration set cannot be read, or its images have another size.
    """
    path = None if root is None else root / CALIBRATION_FILE
    if path is None or not path.is_file():
        random = torch.Generator().manual_seed(_SEED)
        codes = torch.randint(0, 256, (min(count, 16), 3, *preprocessing.crop), generator=random, dtype=torch.uint8)
        return ProbeImages(preprocessing.normalize(codes), "random pixels (there are no calibration images)")
    try:
        with safe_open(path, framework="pt") as file:
            codes = file.get_slice("images")[:count]
    except (OSError, SafetensorError, KeyError) as error:
        raise _bad(path, f"{type(error).__name__}: {error}") from error
    if codes.dtype != torch.uint8 or codes.shape[1:] != (3, *preprocessing.crop) or not len(codes):
        raise _bad(path, f"it holds {tuple(codes.shape)} {codes.dtype}, expected (N, 3, *{preprocessing.crop}) uint8")
    return ProbeImages(preprocessing.normalize(codes), "calibration images of the artifact")


def folder_images(folder: Path, preprocessing: Preprocessing, count: int = MOST_IMAGES) -> ProbeImages:
    """At most `count` images of an image folder, drawn at random from all classes with a fixed seed.

    Raises:
        ConfigurationError: it is not an image folder, or an image cannot be read.
    """
    found = read_image_folder(folder)
    random = torch.Generator().manual_seed(_SEED)
    rows = sorted(torch.randperm(len(found.files), generator=random)[:count].tolist())
    codes = torch.cat(list(batches(found, rows, preprocessing, _READ_AT_ONCE)))
    return ProbeImages(preprocessing.normalize(codes), "images of the folder")


def _bad(path: Path, why: str) -> BadArtifactError:
    return BadArtifactError(f"{path} holds no calibration images", why=why, fix="write the artifact again")
