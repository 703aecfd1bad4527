"""Applies equivalent transforms to a float model, and keeps only those after which it provably computes the same.

Each step works on a copy. Its answers on calibration images are compared with the original's; a step that changes
them by more than fp32 rounding is dropped, with a note that says so. So a family that nobody has tried can lose the
gain of a step, never its accuracy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor, nn

from fp8pipe.models.vision.prepare import vision_outputs
from fp8pipe.models.vision.sources import VisionModel
from fp8pipe.models.vision.structure import VitStructure
from pipeline.vit.config import TransformsConfig
from pipeline.vit.transforms.centre import centre
from pipeline.vit.transforms.heads import rotate_heads
from pipeline.vit.transforms.residual import NotRotatable, rotate_residual
from pipeline.vit.transforms.wiring import read_wiring

# Relative to the largest output. Rounding moves outputs by some 1e-6, a wrong fold by more than 1e-2.
_TOLERANCE: Final = 1e-4
_BATCH: Final = 32
_CHECKED: Final = 8


@dataclass(frozen=True, slots=True)
class Transformed:
    """The model in its new form.

    Attributes:
        vision: the same architecture with other weights.
        steps: what was done, in words.
        notes: what could not be done, and why.
    """

    vision: VisionModel
    steps: tuple[str, ...]
    notes: tuple[str, ...]


def apply_transforms(
    vision: VisionModel, structure: VitStructure, pixels: Tensor, config: TransformsConfig, seed: int
) -> Transformed:
    """Rotate and centre a model, as far as it allows.

    Args:
        vision: the float model; not changed.
        structure: of it.
        pixels: normalized calibration images `(N, 3, H, W)`.
        config: which steps to take.
        seed: of the rotations.
    """
    model, steps, notes = vision.model, [], []
    reference = _answers(model, pixels)
    for wanted, name, change in _steps(structure, pixels, config, seed):
        if not wanted:
            continue
        changed = copy.deepcopy(model)
        try:
            done = change(changed)
        except NotRotatable as reason:
            notes.append(f"{name}: left out, {reason}")
            continue
        difference = float((_answers(changed, pixels) - reference).abs().max() / reference.abs().max())
        if done == 0:
            notes.append(f"{name}: left out, no part of this model allows it")
        elif difference > _TOLERANCE:
            notes.append(f"{name}: left out, it would change the answers by {difference:.1e} of the largest")
        else:
            model = changed
            steps.append(f"{name} ({done} places, answers changed by {difference:.1e})")
    return Transformed(replace(vision, model=model), tuple(steps), tuple(notes))


def _steps(
    structure: VitStructure, pixels: Tensor, config: TransformsConfig, seed: int
) -> list[tuple[bool, str, Callable[[nn.Module], int]]]:
    def rotate_stream(model: nn.Module) -> int:
        rotate_residual(model, structure, read_wiring(model, structure), torch.Generator().manual_seed(seed))
        return 1

    def rotate_each_head(model: nn.Module) -> int:
        return rotate_heads(model, read_wiring(model, structure), torch.Generator().manual_seed(seed))

    def centre_means(model: nn.Module) -> int:
        return centre(model, read_wiring(model, structure), pixels.split(_BATCH))

    return [
        (config.rotate_residual, "rotation of the residual stream", rotate_stream),
        (config.rotate_heads, "rotation of heads", rotate_each_head),
        (config.centre, "centring", centre_means),
    ]


@torch.no_grad()
def _answers(model: nn.Module, pixels: Tensor) -> Tensor:
    return vision_outputs(model, pixels[:_CHECKED])
