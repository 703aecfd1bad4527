"""What a quantization run would take, from the model's structure and a short measurement (`--dry-run`)."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from calibration.make import FOLDER_PREFIX, ImageRequest
from fp8pipe.vision.outputs import vision_outputs
from fp8pipe.vision.sources import load_vision_model
from fp8pipe.vision.structure import read_structure
from pipeline.vit.config import QuantizeVitConfig
from pipeline.vit.formats import weight_formats

_MIB = 1 << 20
_FORWARDS_A_STEP = 3.0  # forward and backward, in forward passes
_STUDENT_AND_TEACHER = 5.0  # a distillation step: the teacher's forward, the student's rounding, forward and backward
_PROBE_IMAGES = 4


@dataclass(frozen=True, slots=True)
class VitPlan:
    """A run's needs.

    Attributes:
        linears: linear layers that would be quantized.
        attentions: attentions whose products would be.
        parameters: of the model.
        weight_bytes: of the quantized weights, packed at their bits.
        image_seconds: estimated time for the images.
        training_seconds: estimated time for the distillation.
        memory_bytes: weights, gradients and optimizer state; activations come on top.
        disk_bytes: artifact, images and checkpoints.
    """

    linears: int
    attentions: int
    parameters: int
    weight_bytes: int
    image_seconds: float
    training_seconds: float
    memory_bytes: int
    disk_bytes: int

    def document(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {"plan": asdict(self)}

    def text(self) -> str:
        """The plan for people."""
        return "\n".join(
            [
                f"would quantize {self.linears} linear layers and the products of {self.attentions} attentions",
                f"parameters: {self.parameters:,}; quantized weights {self.weight_bytes / _MIB:.1f} MiB",
                f"time on this machine, roughly: images {self.image_seconds:.0f} s, "
                f"distillation {self.training_seconds:.0f} s",
                f"memory before activations: {self.memory_bytes / _MIB:.0f} MiB",
                f"disk: {self.disk_bytes / _MIB:.0f} MiB",
            ]
        )


def plan_quantize_vit(config: QuantizeVitConfig) -> VitPlan:
    """Plan a run; one forward pass is timed, nothing is written.

    Raises:
        ConfigurationError: what the run itself would refuse about model, bits and calibration.
    """
    ImageRequest(config.calibration, config.images, config.seed, config.synthesis).check()
    vision = load_vision_model(config.model)
    size = vision.architecture.image_size
    structure = read_structure(vision.model, size)
    pixels = torch.zeros(_PROBE_IMAGES, 3, *size)
    with torch.no_grad():
        vision_outputs(vision.model, pixels)
        started = time.perf_counter()
        vision_outputs(vision.model, pixels)
        forward = (time.perf_counter() - started) / _PROBE_IMAGES
    made = config.calibration != "gaussian" and not config.calibration.startswith(FOLDER_PREFIX)
    parameters = sum(p.numel() for p in vision.model.parameters())
    formats = weight_formats(structure, config.precision, config.edges)
    bits = sum(site.shape[0] * site.shape[1] * formats[site.name].bits for site in structure.linears)
    images = config.images * 3 * size[0] * size[1]
    return VitPlan(
        linears=len(structure.linears),
        attentions=len(structure.attentions),
        parameters=parameters,
        weight_bytes=bits // 8,
        image_seconds=forward * _FORWARDS_A_STEP * config.images * config.synthesis.steps if made else 0.0,
        training_seconds=forward * _STUDENT_AND_TEACHER * config.distill.steps * config.distill.batch_size,
        memory_bytes=parameters * 4 * 5 + images * 5,
        disk_bytes=parameters * (4 * 3 * 2 + 2) + images * 2,
    )
