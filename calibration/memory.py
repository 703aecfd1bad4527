"""How many images a GPU makes at once: as many as its free memory holds, reckoned from the model's shapes.

What a step keeps for its backward pass is activations alone, since no weight gets a gradient: of what linears read and
give a part, in the type that the model runs in, and copies of every attention map, more of one that is compared between
heads. The factors were counted on fake CUDA tensors of ViTs of five sizes and a Swin at 224 pixels, and lie 6 to 20 %
above what the default settings hold there, 31 to 36 % with fp32 models; `tests/calibration/test_step_limits.py` counts
again.
"""

from __future__ import annotations

import math
from typing import Final

import torch

from calibration.config import SynthesisConfig
from fp8pipe.models.vision.structure import VitStructure

_SHARE: Final = 0.8  # of the free memory: the allocator's pieces and workspaces of products take the rest
_PIXEL_COPIES: Final = 16  # fp32, of an image: its canvas, moments and gradients, its view, the variation
_LINEAR_COPIES: Final = 0.75  # of what a linear reads and gives, in the model's type
_MAP_COPIES: Final = 3.0  # of an attention's map, in the model's type
_COMPARED_COPIES: Final = 4.5  # of one that is compared, fp32


def images_at_once(structure: VitStructure, config: SynthesisConfig, device: torch.device) -> int | None:
    """Most images that the free memory of `device` holds, at least 1; None on a CPU, which takes what it is given."""
    if device.type == "cpu":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, int(_SHARE * free) // bytes_per_image(structure, config))


def bytes_per_image(structure: VitStructure, config: SynthesisConfig) -> int:
    """Bytes that a step of synthesis holds for each image at its peak; for default terms, others add little."""
    width = 2 if config.bf16 else 4
    pixels = 3 * math.prod(structure.image_size)
    linears = sum(site.rows * sum(site.shape) for site in structure.linears)
    maps = {site.name: site.windows * site.heads * site.tokens * site.queries for site in structure.attentions}
    compared = sum(maps[site.name] for site in structure.attentions if not site.pools and site.heads > 1)
    total = 4 * _PIXEL_COPIES * pixels + width * (_LINEAR_COPIES * linears + _MAP_COPIES * sum(maps.values()))
    return math.ceil(total + (4 * _COMPARED_COPIES * compared if config.similarity else 0))
