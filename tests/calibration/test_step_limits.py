"""What a step of synthesis asks of a GPU, at the shapes of ViT-B: it may only become less, and the host never waits.

Images of 224 pixels, counted on fake tensors (`support/fake_cuda.py`), which also hold the memory of a step to what
`calibration.memory` reckons. Who makes a step cheaper lowers its row of `LIMITS`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_cuda import fake_cuda
from fake_vit import make, structure_of

from calibration.config import SynthesisConfig
from calibration.generator import Synthesizer
from calibration.memory import bytes_per_image
from fp8pipe.core.config import build_config

IMAGES = 16
# Kernels, GB moved, GB held at most, the model among them.
LIMITS = {
    "default": ({"start": "noise"}, 1, 1.0, 1.0),
    "published": ({"preset": "published"}, 1, 1.0, 1.0),
}


def second_step(changes: dict[str, Any], images: int, monkeypatch) -> tuple[float, float, float]:
    """Kernels, GB moved and GB held at most in the second step of a batch; the host must not have waited."""
    structure = structure_of()
    config = build_config(SynthesisConfig, {**changes, "steps": 3})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 << 30, 80 << 30))
    counted = []
    with fake_cuda() as counter:

        def on_step(step: int) -> None:
            if step == 2:
                assert counter.syncs == {}
                counted.extend((counter.kernels.total(), counter.traffic / 1e9, counter.peak / 1e9))
            counter.clear()

        Synthesizer(make(), structure, config, seed=0)._optimise(list(range(images)), [0] * images, on_step)
    return tuple(counted)


@pytest.mark.parametrize("name", LIMITS)
def test_a_step_asks_no_more_of_a_gpu_than_before(name, monkeypatch):
    changes, *limits = LIMITS[name]
    counted = second_step(changes, IMAGES, monkeypatch)
    assert all(now <= limit for now, limit in zip(counted, limits, strict=True)), counted


@pytest.mark.parametrize("name", LIMITS)
def test_memory_is_reckoned_high_enough_and_not_by_half_too_high(name, monkeypatch):
    """The slope from one to three images is what each image takes."""
    changes = LIMITS[name][0]
    one, three = (second_step(changes, images, monkeypatch)[2] * 1e9 for images in (1, 3))
    reckoned = bytes_per_image(structure_of(), build_config(SynthesisConfig, changes))
    assert (three - one) / 2 <= reckoned <= 1.5 * (three - one) / 2
