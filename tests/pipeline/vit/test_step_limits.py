"""What a step of distillation asks of a GPU, at the shapes of ViT-B: it may only become less, and the host never waits.

Two blocks, 16 images of 224 pixels, counted on fake tensors (`support/fake_cuda.py`). Who makes a step cheaper lowers
its row of `LIMITS`. The FP8 student is made there as the stage makes it, from images of the host; every tensor of it is
on the device, and it deploys to the host. (The grids of W4A4 are given: their search tries thousands of ranges.)
"""

from __future__ import annotations

import pytest
import torch
from fake_cuda import fake_cuda
from fake_vit import BASE

from fp8pipe.core.config import build_config
from fp8pipe.models.vision.quantized import activation_sites
from fp8pipe.models.vision.sources import VisionModel
from fp8pipe.models.vision.structure import VitStructure
from fp8pipe.numerics.quantizers import ActivationQuantizer
from pipeline.vit.config import QuantizeVitConfig
from pipeline.vit.distill import Distiller
from pipeline.vit.initialise import weight_formats
from pipeline.vit.stage import begin_student
from pipeline.vit.student import Student

IMAGES = 16
# Kernels, GB moved, GB held at most, all models among them.
LIMITS = {"w4a4": (938, 14.8, 1.06), "wfp8afp8": (850, 11.8, 0.95)}


def given(config: QuantizeVitConfig, vision: VisionModel, shapes: VitStructure) -> Student:
    """A student whose steps are 1 throughout."""
    formats = weight_formats(shapes, config.precision, config.edges)
    steps = {site.name: torch.ones(site.shape[0], device="cuda") for site in shapes.linears}
    return Student(vision, shapes, formats, steps, dict.fromkeys(activation_sites(shapes), _FOUR_BITS))


_FOUR_BITS = ActivationQuantizer(1.0, -8, 7)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize("bits", LIMITS)
def test_a_step_asks_no_more_of_a_gpu_than_before(bits):
    shapes = BASE.structure()
    # Nearest: compensated rounding goes column by column, tens of thousands of them.
    config = build_config(QuantizeVitConfig, {"model": "m", "bits": bits, "rounding": "nearest", "device": "cuda"})
    with fake_cuda(truth=True) as counter:
        teacher, pixels = BASE.make(), torch.zeros(IMAGES, 3, *BASE.size)
        fp8 = bits == "wfp8afp8"
        student = begin_student(config, teacher, shapes, pixels) if fp8 else given(config, teacher, shapes)
        assert {parameter.device.type for parameter in student.parameters()} == {"cuda"}
        distiller = Distiller(student, teacher, shapes, pixels, config.distill, seed=0)
        distiller.one_step()  # makes the optimizer's state
        counter.clear()
        figures = distiller.one_step()
        counted = counter.kernels.total(), counter.traffic / 1e9, counter.peak / 1e9
        waited = dict(counter.syncs), counter.uploads
        deployed = student.deploy()
        held = [*deployed.state_dict().values(), *(weight.codes for weight in deployed.weights.values())]
        assert {tensor.device.type for tensor in held} == {"cpu"}
    assert figures.device.type == "cuda"
    assert waited == ({}, 0)
    assert all(now <= limit for now, limit in zip(counted, LIMITS[bits], strict=True)), counted
