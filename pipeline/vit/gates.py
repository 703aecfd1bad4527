"""Gates on a quantized vision transformer that need no fresh process: its codes, and its agreement with its teacher."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from fp8pipe.artifact import Comparison, Gate, Verdict
from fp8pipe.core.devices import parts_on
from fp8pipe.models.vision.answers import agreeing
from fp8pipe.models.vision.prepare import vision_outputs
from fp8pipe.models.vision.quantized import QuantizedVit
from fp8pipe.models.vision.sources import VisionModel
from fp8pipe.models.vision.structure import VitStructure

_BATCH: Final = 32


def code_gate(quantized: QuantizedVit) -> Gate:
    """A gate that no weight has more distinct codes than its bit width allows, such as 16 for a 4-bit weight."""
    above = sum(len(w.codes.view(torch.uint8).unique()) > 2**w.bits for w in quantized.weights.values())
    return Gate(name="weights with too many codes", value=above)


@torch.no_grad()
def agreement_gate(
    vision: VisionModel, quantized: QuantizedVit, pixels: Tensor, structure: VitStructure, device: torch.device
) -> Gate:
    """A gate on how well the deployed model agrees with its teacher on the calibration images.

    Args:
        vision: the teacher, on `device`.
        quantized: the deployed model, on `device`.
        pixels: normalized images `(N, 3, H, W)`, on the host.
        structure: structure of both models.
        device: where they compute.
    """
    teacher = torch.cat([vision_outputs(vision.model, batch).cpu() for batch in parts_on(pixels, _BATCH, device)])
    student = torch.cat([quantized(batch).cpu() for batch in parts_on(pixels, _BATCH, device)])
    if structure.is_backbone:
        value = float(torch.cosine_similarity(teacher, student, dim=1).mean())
        name = "cosine with the teacher's features"
        detail = "on the calibration images"
    else:
        value = float(agreeing(teacher, student, vision.architecture.activation).float().mean())
        name, detail = "top-1 agreement with the teacher", "on the calibration images"
        if not vision.architecture.ranked:
            name = "agreement with the teacher's outputs"
            detail += ": share whose outputs differ by less than half of the teacher's spread"
    return Gate(
        name=name, value=value, comparison=Comparison.AT_LEAST, threshold=0.5, detail=detail,
        failure=Verdict.REGRESSION,
    )  # fmt: skip
