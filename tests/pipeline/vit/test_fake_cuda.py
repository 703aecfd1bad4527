"""Every part of `quantize-vit` takes its tensors where the model is: each runs on fake CUDA tensors.

Values are not there, so what is decided by them goes one way: transforms are tried and dropped, nothing leaves early.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_cuda import fake_cuda
from fake_vit import TINY

from calibration.config import SynthesisConfig
from calibration.generator import Synthesizer
from fp8pipe.core.config import build_config
from fp8pipe.models.vision.prepare import vision_outputs
from pipeline.vit import evaluate, initialise
from pipeline.vit.augment import first_views
from pipeline.vit.config import QuantizeVitConfig
from pipeline.vit.distill import Distiller
from pipeline.vit.gates import agreement_gate
from pipeline.vit.stage import begin_student
from pipeline.vit.transforms.apply import apply_transforms

IMAGES, CUDA = 4, torch.device("cuda")
pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer")


# Compensated rounding goes column by column, which takes its time here: once is enough.
@pytest.mark.parametrize(("bits", "rounding"), [("w4a4", "nearest"), ("wnvfp4anvfp4", "compensated")])
def test_a_student_is_begun_trained_deployed_and_judged(bits, rounding, monkeypatch):
    shapes = TINY.structure()
    monkeypatch.setattr(initialise, "_SHRINKS", (1.0, 0.5))
    monkeypatch.setattr(initialise, "_WEIGHT_SHRINKS", (1.0, 0.5))
    config = build_config(QuantizeVitConfig, {"model": "m", "bits": bits, "rounding": rounding, "device": "cuda"})
    with fake_cuda(truth=True, integer=0) as counter:
        teacher = TINY.make()
        images = torch.zeros(IMAGES, 3, *TINY.size)
        views = first_views(images, config.distill, 0, CUDA)
        assert views.device.type == "cpu"
        tried = apply_transforms(teacher, shapes, views, config.conditioning, 0)
        assert len(tried.notes) == 3, tried  # each would change the answers by 1
        student = begin_student(config, tried.vision, shapes, views)
        distiller = Distiller(student, teacher, shapes, images, config.distill, seed=0)
        counter.clear()
        distiller.one_step()
        assert (counter.syncs, counter.uploads) == ({}, 0)
        running = student.deploy().to(CUDA)
        agreement_gate(teacher, running, images, shapes, CUDA)
        monkeypatch.setattr(evaluate, "batches", lambda *given: [torch.zeros(3, 3, *TINY.size, dtype=torch.uint8)])
        folder = evaluate.ImageFolder(None, ("class 1", "class 7"), (None,) * 3, (0, 1, 1))
        models = {"teacher": lambda x: vision_outputs(teacher.model, x), "student": running}
        found = evaluate.accuracy(models, folder, teacher.preprocessing, teacher.architecture.classes, CUDA)
    assert set(found) == {"images", "teacher", "student"}


OPTIONS: dict[str, dict[str, Any]] = {
    "maps": {"maps": "probabilities", "similarity_form": "absolute"},
    "published": {"preset": "published", "similarity": 0.0, "entropy": 1.0},
    "plateau": {"plateau": 0.1, "plateau_window": 1, "steps": 3},
}  # fmt: skip


def test_synthesis_runs_with_every_option(monkeypatch):
    shapes = TINY.structure()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 << 30, 8 << 30))
    waited = {}
    with fake_cuda(truth=True) as counter:
        vision = TINY.make()
        for name, changes in OPTIONS.items():
            config = build_config(SynthesisConfig, {"start": "noise", "steps": 2} | changes)
            synthesizer = Synthesizer(vision, shapes, config, seed=0)

            def on_step(step: int, name: str = name) -> None:
                waited[name] = counter.syncs.total() + counter.uploads
                counter.clear()

            pixels, labels, losses = synthesizer._optimise([0, 1, 2], [0, 0, 0], on_step)
            assert (pixels.device.type, labels.device.type) == ("cuda", "cpu")
            assert {len(values) for values in losses.values()} == {3}
    assert waited == dict.fromkeys(OPTIONS, 0) | {"plateau": 1}  # who leaves has to be known
