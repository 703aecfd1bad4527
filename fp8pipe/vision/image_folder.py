"""Labelled pictures on disk: one folder a class, the layout that most tools write."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from fp8pipe.errors import ConfigurationError
from fp8pipe.vision.preprocessing import Preprocessing

__all__ = ["ImageFolder", "batches", "read_image_folder", "read_pixels"]

SUFFIXES: Final = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"))


@dataclass(frozen=True, slots=True)
class ImageFolder:
    """The pictures of a folder, class by class, each in the order of the names.

    Attributes:
        path: the folder.
        classes: names of the class folders, sorted.
        files: the pictures.
        labels: for each of them the index of its class.
    """

    path: Path
    classes: tuple[str, ...]
    files: tuple[Path, ...]
    labels: tuple[int, ...]


def read_image_folder(path: Path) -> ImageFolder:
    """List the pictures of `path/CLASS/NAME.jpg` (any depth below the class; hidden files and others are skipped).

    Raises:
        ConfigurationError: no folder, no class folders, or a class without pictures.
    """
    if not path.is_dir():
        raise ConfigurationError(
            f"{path} is not an image folder", why="there is no such directory", fix="give a folder with one per class"
        )
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    found = {folder: sorted(_pictures(folder)) for folder in folders}
    empty = [folder.name for folder, pictures in found.items() if not pictures]
    if not folders or empty:
        loose = sum(1 for _ in _pictures(path)) if not folders else 0
        why = f"no pictures in {', '.join(empty[:5])}" if empty else f"it has no folders, and {loose} pictures"
        raise ConfigurationError(
            f"{path} is not an image folder",
            why=why,
            fix=f"put the pictures into one folder a class ({', '.join(sorted(SUFFIXES))})",
        )
    files = tuple(picture for pictures in found.values() for picture in pictures)
    labels = tuple(label for label, pictures in enumerate(found.values()) for _ in pictures)
    return ImageFolder(path, tuple(folder.name for folder in folders), files, labels)


def read_pixels(file: Path, preprocessing: Preprocessing) -> Tensor:
    """One picture as (3, H, W) uint8, resized and cropped.

    Raises:
        ConfigurationError: it cannot be read; the error names the file.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(file) as image:
            return preprocessing.pixels(image)
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigurationError(
            f"{file} cannot be read as a picture",
            why=f"{type(error).__name__}: {str(error).partition(chr(10))[0]}",
            fix="repair or remove the file",
        ) from error


def batches(folder: ImageFolder, rows: list[int], preprocessing: Preprocessing, size: int) -> Iterator[Tensor]:
    """The pictures of `rows` in batches of at most `size`: (n, 3, H, W) uint8."""
    for start in range(0, len(rows), size):
        chunk = rows[start : start + size]
        yield torch.stack([read_pixels(folder.files[row], preprocessing) for row in chunk])


def _pictures(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file():
            yield path
