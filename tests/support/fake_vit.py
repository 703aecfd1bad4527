"""ViT-B with 16-pixel patches at 224 pixels, of shapes alone: for counting what its synthesis and distillation take."""

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

__all__ = ["SIZE", "make", "structure_of"]

SIZE = (224, 224)
_MODEL = "vit_base_patch16_224"
_HALF = (0.5, 0.5, 0.5)


def make(name: str = _MODEL) -> VisionModel:
    """A model of timm with 1,000 classes, made on "cuda" inside of `fake_cuda()`."""
    with torch.device("cuda"):
        model = prepare_model(timm.create_model(name))
    classes = tuple(f"class {number}" for number in range(1000))
    described = Architecture(
        library="timm", name=name, arguments={}, image_size=SIZE, classes=classes, head="classifier"
    )
    preprocessing = Preprocessing(resize=224, crop=SIZE, mean=_HALF, std=_HALF)
    return VisionModel(model, described, preprocessing, name, "")


@cache
def structure_of(name: str = _MODEL) -> VitStructure:
    """Its structure, which values do not decide; read before `fake_cuda()`, outside of which it stays real."""
    with torch.device("meta"):
        model: nn.Module = prepare_model(timm.create_model(name))
    return read_structure(model, SIZE)
