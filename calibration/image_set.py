"""A set of calibration images, in memory and on disk: uint8 pixels, labels, losses, and a contact sheet to look at."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file
from safetensors.torch import save as serialized
from torch import Tensor

from fp8pipe.core.errors import BadArtifactError

IMAGES_FILE: Final = "images.safetensors"
FACTS_FILE: Final = "images.json"
SHEET_FILE: Final = "contact_sheet.png"
_SHEET_IMAGES, _CAPTION = 64, 12


@dataclass(frozen=True, slots=True)
class ImageSet:
    """A set of calibration images, with a record of how they were made."""

    images: Tensor  # `(N, 3, H, W)` uint8: the model's input before normalization
    labels: Tensor | None  # `(N,)` int64 classes; None if there are none
    method: str  # the calibration method that made them
    seed: int | None  # seed of their random streams; None for images from a folder
    losses: dict[str, list[float]] = field(default_factory=dict)  # final value of each loss by name, one per image
    notes: list[str] = field(default_factory=list)  # messages about restarts and the like

    @property
    def mean_losses(self) -> dict[str, float]:
        """The mean over the images of each loss, by name."""
        return {name: sum(values) / len(values) for name, values in self.losses.items() if values}

    def to_bytes(self) -> bytes:
        """The set as a safetensors file with its record in the metadata."""
        facts = {"method": self.method, "seed": self.seed, "losses": self.losses, "notes": self.notes}
        return serialized(self._tensors(), {"facts": json.dumps(facts)})

    @classmethod
    def from_bytes(cls, data: bytes) -> ImageSet:
        """A set from what `to_bytes` returned."""
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        facts, tensors = json.loads(header["__metadata__"]["facts"]), load(data)
        return cls(tensors["images"], tensors.get("labels"), **facts)

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"images": self.images.contiguous()}
        return tensors if self.labels is None else tensors | {"labels": self.labels.contiguous()}

    def save(self, folder: Path, classes: Sequence[str] | None = None) -> None:
        """Write images.safetensors, images.json and contact_sheet.png.

        `classes` are the names of all classes, for the contact sheet; without them it shows class indices.
        """
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self._tensors(), folder / IMAGES_FILE)
        facts: dict[str, Any] = {
            "method": self.method, "seed": self.seed, "count": len(self.images),
            "losses": self.losses, "notes": self.notes,
        }  # fmt: skip
        (folder / FACTS_FILE).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        contact_sheet(self.images, self.labels, classes, folder / SHEET_FILE)

    @classmethod
    def joined(cls, parts: Sequence[ImageSet]) -> ImageSet:
        """Concatenate sets that were made with the same settings, in the given order."""
        first = parts[0]
        if len(parts) == 1:
            return first
        labels = [part.labels for part in parts if part.labels is not None]
        return cls(
            torch.cat([part.images for part in parts]), torch.cat(labels) if labels else None, first.method, first.seed,
            {name: [value for part in parts for value in part.losses[name]] for name in first.losses},
            [note for part in parts for note in part.notes],
        )  # fmt: skip

    def part(self, start: int, stop: int) -> ImageSet:
        """Images `start` to `stop - 1`; only the part that starts at 0 keeps the notes."""
        return ImageSet(
            self.images[start:stop], None if self.labels is None else self.labels[start:stop], self.method, self.seed,
            {name: values[start:stop] for name, values in self.losses.items()}, [] if start else self.notes,
        )  # fmt: skip

    @classmethod
    def load(cls, folder: Path) -> ImageSet:
        """Read a set that `save` wrote.

        Raises:
            BadArtifactError: a file is missing or damaged.
        """
        try:
            tensors = load_file(folder / IMAGES_FILE)
            facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
            images = tensors["images"]
            if images.dtype != torch.uint8 or images.dim() != 4 or len(images) != facts["count"]:
                raise ValueError(f"{facts['count']} uint8 images expected, found {images.dtype} {tuple(images.shape)}")
            return cls(images, tensors.get("labels"), facts["method"], facts["seed"], facts["losses"], facts["notes"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise BadArtifactError(
                f"{folder} does not hold a set of calibration images",
                why=f"{type(error).__name__}: {error}",
                fix="make the images again",
            ) from error


def contact_sheet(images: Tensor, labels: Tensor | None, classes: Sequence[str] | None, path: Path) -> None:
    """Write the first 64 images as one PNG, eight per row, each with the name or index of its class below."""
    from PIL import Image, ImageDraw

    shown = images[:_SHEET_IMAGES]
    height, width = shown.shape[2:]
    across = min(8, len(shown))
    cell = height + (_CAPTION if labels is not None else 0)
    sheet = Image.new("RGB", (across * width, math.ceil(len(shown) / across) * cell), "white")
    pen = ImageDraw.Draw(sheet)
    for index, image in enumerate(shown):
        left, top = index % across * width, index // across * cell
        sheet.paste(Image.fromarray(image.permute(1, 2, 0).numpy()), (left, top))
        label = -1 if labels is None else int(labels[index])
        if label >= 0:
            pen.text((left + 1, top + height), classes[label] if classes else str(label), fill="black")
    sheet.save(path)
