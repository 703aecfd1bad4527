"""Estimates how many images fit into a GPU's free memory at once, from the model's shapes.

Weights get no gradients, so a step keeps only activations for its backward pass: part of the inputs and outputs of
linear layers, in the model's compute dtype, and several copies of every attention map, more of those that are compared
between heads. The factors were determined with fake CUDA tensors for ViTs of five sizes and a Swin at 224 pixels. They
overestimate the memory by 6 to 20 % with default settings, and by 31 to 36 % with fp32 models;
`tests/calibration/test_step_limits.py` checks this.
"""

from __future__ import annotations

import math
from typing import Final

import torch

from calibration.config import SynthesisConfig
from fp8pipe.models.vision.structure import VitStructure

_SHARE: Final = 0.8  # part of the free memory to use; the rest is left for fragmentation and GEMM workspaces
# How many times a step holds each tensor:
_PIXEL_COPIES: Final = 16  # of an image, fp32: its canvas, moments, gradients, view, and total variation
_LINEAR_COPIES: Final = 0.75  # of the input and output of a linear layer, in the compute dtype
_MAP_COPIES: Final = 3.0  # of an attention map, in the compute dtype
_COMPARED_COPIES: Final = 4.5  # of an attention map that is compared, fp32


def images_at_once(structure: VitStructure, config: SynthesisConfig, device: torch.device) -> int | None:
    """Maximum number of images that fit into the free memory of `device`, at least 1; None (no limit) on a CPU."""
    if device.type == "cpu":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, int(_SHARE * free) // bytes_per_image(structure, config))


def bytes_per_image(structure: VitStructure, config: SynthesisConfig) -> int:
    """Peak memory of a synthesis step per image, in bytes, with the default loss terms; other terms add little."""
    width = 2 if config.bf16 else 4
    pixels = 3 * math.prod(structure.image_size)
    linears = sum(site.rows * sum(site.shape) for site in structure.linears)
    maps = {site.name: site.windows * site.heads * site.tokens * site.queries for site in structure.attentions}
    compared = sum(maps[site.name] for site in structure.attentions if not site.pools and site.heads > 1)
    total = 4 * _PIXEL_COPIES * pixels + width * (_LINEAR_COPIES * linears + _MAP_COPIES * sum(maps.values()))
    return math.ceil(total + (4 * _COMPARED_COPIES * compared if config.similarity else 0))
