"""scikit-learn's handwritten digits as labelled pictures, and the small ViT that was trained on them.

1797 real 8 x 8 scans (UCI optical digits, test part) with 17 grey levels come with scikit-learn, so a real
classifier with real held-out images is there without a download. Every third image is held out: training and
every choice made in it see the others alone.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from fp8pipe.artifact import sha256_file
from fp8pipe.core.errors import BadArtifactError, ConfigurationError
from fp8pipe.models.compat import import_package
from fp8pipe.models.vision.preprocessing import Preprocessing

DIGITS_CLASSES: Final = tuple(str(digit) for digit in range(10))
# 8 pixels become 24, so that a patch of 4 covers a little more than one of the scan's pixels.
DIGITS_PREPROCESSING: Final = Preprocessing(
    resize=(24, 24), crop=(24, 24), interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
)
_WEIGHTS: Final = Path(__file__).parent / "weights" / "vit_digits"
# Of the committed model.safetensors, as scripts/train_vit_digits.py wrote it.
_WEIGHTS_SHA256: Final = "dae800186dcbdbfca585da42d65770cc72397cbd540ea9a6009444bf00fbabec"
_HELD_OUT_EVERY: Final = 3


@dataclass(frozen=True, slots=True)
class Digits:
    """One part of the digits.

    Attributes:
        images: (N, 3, 8, 8) uint8, three equal channels.
        labels: (N,) int64, 0 to 9.
    """

    images: Tensor
    labels: Tensor


def digits_split() -> tuple[Digits, Digits]:
    """The training part (1198 images) and the held-out part (599): image i is held out when i % 3 is 2.

    Raises:
        MissingCapabilityError: scikit-learn is not installed.
    """
    datasets = import_package(
        "sklearn.datasets", "the digits need the package scikit-learn", "pip install 'fp8pipe[samples]'"
    )
    bunch = datasets.load_digits()
    grey = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)  # 0..16 -> 0..255
    images = grey[:, None].expand(-1, 3, -1, -1)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    held_out = torch.arange(len(labels)) % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1
    train, test = (Digits(images[rows].contiguous(), labels[rows]) for rows in (~held_out, held_out))
    return train, test


def write_digits(folder: Path, part: Digits) -> None:
    """Write a part as an image folder: `folder/DIGIT/NUMBER.png`, 8 x 8 greys, as scanned.

    Raises:
        ConfigurationError: the folder exists and is not empty.
    """
    from PIL import Image

    if folder.exists() and any(folder.iterdir()):
        raise ConfigurationError(
            f"{folder} is not empty", why="images of another set would be mixed in", fix="name a new folder"
        )
    for name in DIGITS_CLASSES:
        (folder / name).mkdir(parents=True)
    for index, (image, label) in enumerate(zip(part.images, part.labels.tolist(), strict=True)):
        Image.fromarray(image[0].numpy()).save(folder / DIGITS_CLASSES[label] / f"{index:04d}.png")


def digits_folder() -> Path:
    """The held-out digits as an image folder in the cache, written when it is not there: `sample:digits`.

    Raises:
        MissingCapabilityError: scikit-learn is not installed.
    """
    cache = Path(os.environ.get("FP8PIPE_CACHE") or Path.home() / ".cache" / "fp8pipe")
    folder = cache / "samples" / "digits-held-out"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            write_digits(Path(scratch) / "digits", digits_split()[1])
            with contextlib.suppress(OSError):  # another process was first, with the same pictures
                (Path(scratch) / "digits").rename(folder)
    return folder


def digits_weights_folder() -> Path:
    """Where the trained ViT lies: a directory for `load_vision_model`, its digest checked.

    Raises:
        BadArtifactError: the weights are absent, or not the published ones.
    """
    weights = _WEIGHTS / "model.safetensors"
    found = sha256_file(weights) if weights.is_file() else "that of no file"
    if found != _WEIGHTS_SHA256:
        raise BadArtifactError(
            f"{weights} is not the published ViT of sample:vit-digits",
            why=f"sha256 is {found}, expected {_WEIGHTS_SHA256}",
            fix="install fp8pipe again",
        )
    return _WEIGHTS
