"""Reads labelled images from a folder with one subfolder per class, the layout that most tools use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from fp8pipe.core.errors import ConfigurationError, class_and_first_line
from fp8pipe.models.vision.preprocessing import Preprocessing

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES: Final = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"))
UNLABELLED: Final = ("",)  # value of `ImageFolder.classes` if the images are not sorted into class folders
_SMALL: Final = (64, 64)


@dataclass(frozen=True, slots=True)
class ImageFolder:
    """The images of a folder, grouped by class and sorted by name within a class.

    Attributes:
        path: the folder.
        classes: names of the class folders, sorted.
        files: paths of the images.
        labels: for each image, the index of its class in `classes`.
    """

    path: Path
    classes: tuple[str, ...]
    files: tuple[Path, ...]
    labels: tuple[int, ...]


def read_image_folder(path: Path) -> ImageFolder:
    """List the images of a folder with one subfolder per class, `path/CLASS/NAME.jpg`.

    Images may be at any depth below their class folder. Hidden files and files of other types are skipped.

    Raises:
        ConfigurationError: the folder does not exist, has no class folders, or a class has no images.
    """
    if not path.is_dir():
        raise ConfigurationError(
            f"{path} is not an image folder",
            why="there is no such directory",
            fix="give a folder that holds one folder per class",
        )
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = {folder: sorted(_pictures(folder)) for folder in folders}
    empty = [folder.name for folder, pictures in found.items() if not pictures]
    if not folders or empty:
        loose = 0 if folders else len(_pictures(path))
        raise ConfigurationError(
            f"{path} is not an image folder",
            why=f"no pictures in {', '.join(empty[:5])}" if empty else f"it has no folders, and {loose} pictures",
            fix=f"put the pictures into one folder per class ({', '.join(sorted(SUFFIXES))})",
        )
    files = tuple(picture for pictures in found.values() for picture in pictures)
    labels = tuple(label for label, pictures in enumerate(found.values()) for _ in pictures)
    return ImageFolder(path, tuple(folder.name for folder in folders), files, labels)


def list_pictures(path: Path) -> ImageFolder:
    """List the images of a folder when no labels are needed.

    They are either directly in the folder, and then have the class `UNLABELLED`, or in one subfolder per class.

    Raises:
        ConfigurationError: the folder does not exist, or has neither layout.
    """
    entries = sorted(p for p in path.iterdir() if not p.name.startswith(".")) if path.is_dir() else []
    loose = [] if any(p.is_dir() for p in entries) else [p for p in entries if _is_picture(p)]
    return ImageFolder(path, UNLABELLED, tuple(loose), (0,) * len(loose)) if loose else read_image_folder(path)


def check_pictures(folder: ImageFolder) -> None:
    """Decode every image once (JPEGs at reduced size), so that broken files are detected before hours of work.

    Raises:
        ConfigurationError: an image cannot be read; the error names the file.
    """
    for file in folder.files:
        with _opened(file) as image:
            image.draft("RGB", _SMALL)
            image.load()


def read_pixels(file: Path, preprocessing: Preprocessing) -> Tensor:
    """Read one image, resized and cropped by `preprocessing` but not normalized: (3, H, W) uint8.

    Raises:
        ConfigurationError: the image cannot be read; the error names the file.
    """
    with _opened(file) as image:
        return preprocessing.pixels(image)


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            yield image
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigurationError(
            f"{file} cannot be read as a picture",
            why=class_and_first_line(error),
            fix="repair or remove the file",
        ) from error


def batches(folder: ImageFolder, rows: list[int], preprocessing: Preprocessing, size: int) -> Iterator[Tensor]:
    """Yield the images at the indices `rows` in batches of at most `size`: (n, 3, H, W) uint8; see `read_pixels`."""
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        yield torch.stack([read_pixels(folder.files[row], preprocessing) for row in chunk])


def _pictures(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if _is_picture(path) and path.is_file()]


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
