"""Two blocks of ViT-B with 16-pixel patches at 224 pixels, of shapes alone: for counting what a step takes."""

from __future__ import annotations

from functools import cache

import timm
import torch
from torch import nn

from fp8pipe.models.vision.architecture import Architecture
from fp8pipe.models.vision.prepare import prepare_model
from fp8pipe.models.vision.preprocessing import Preprocessing
from fp8pipe.models.vision.sources import VisionModel
from fp8pipe.models.vision.structure import VitStructure, read_structure

__all__ = ["SIZE", "make", "structure"]

SIZE = (224, 224)
_MODEL, _ARGUMENTS = "vit_base_patch16_224", {"depth": 2}
_HALF = (0.5, 0.5, 0.5)


def make() -> VisionModel:
    """The model, with 1,000 classes, made on "cuda" inside of `fake_cuda()`."""
    described = Architecture(
        library="timm", name=_MODEL, arguments=_ARGUMENTS, image_size=SIZE, head="classifier",
        classes=tuple(f"class {number}" for number in range(1000)),
    )  # fmt: skip
    preprocessing = Preprocessing(resize=224, crop=SIZE, mean=_HALF, std=_HALF)
    return VisionModel(_made("cuda"), described, preprocessing, _MODEL, "")


@cache
def structure() -> VitStructure:
    """Its structure, which values do not decide. Read it before `fake_cuda()`: what is imported inside stays fake."""
    return read_structure(_made("meta"), SIZE)


def _made(device: str) -> nn.Module:
    with torch.device(device):
        return prepare_model(timm.create_model(_MODEL, **_ARGUMENTS))
