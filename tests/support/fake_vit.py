"""Vision transformers of shapes alone, made inside of `fake_cuda()`: to count what a step takes, and to try devices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import timm
import torch
from torch import nn

from fp8pipe.models.vision.architecture import Architecture
from fp8pipe.models.vision.prepare import prepare_model
from fp8pipe.models.vision.preprocessing import Preprocessing
from fp8pipe.models.vision.sources import VisionModel
from fp8pipe.models.vision.structure import VitStructure, read_structure

__all__ = ["BASE", "TINY", "FakeVit"]

_HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class FakeVit:
    """A model of timm with two blocks and patches of 16 pixels, of `side` by `side` pixels."""

    name: str
    side: int
    classes: int
    width: int
    heads: int

    @property
    def size(self) -> tuple[int, int]:
        return self.side, self.side

    def make(self) -> VisionModel:
        """The model on "cuda"; called inside of `fake_cuda()`."""
        described = Architecture(
            library="timm", name=self.name, arguments=self._arguments(), image_size=self.size, head="classifier",
            classes=tuple(f"class {number}" for number in range(self.classes)),
        )  # fmt: skip
        preprocessing = Preprocessing(resize=self.side, crop=self.size, mean=_HALF, std=_HALF)
        return VisionModel(self._made("cuda"), described, preprocessing, self.name, "")

    @cache  # noqa: B019 (there are two)
    def structure(self) -> VitStructure:
        """Its structure, which no value decides. Read before `fake_cuda()`: what is imported inside stays fake."""
        return read_structure(self._made("meta"), self.size)

    def _made(self, device: str) -> nn.Module:
        with torch.device(device):
            return prepare_model(timm.create_model(self.name, **self._arguments()))

    def _arguments(self) -> dict[str, Any]:
        return {"depth": 2, "embed_dim": self.width, "num_heads": self.heads, "img_size": self.side,
                "num_classes": self.classes}  # fmt: skip


BASE = FakeVit("vit_base_patch16_224", 224, 1000, 768, 12)
TINY = FakeVit("vit_tiny_patch16_224", 32, 8, 16, 2)
