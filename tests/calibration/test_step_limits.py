"""What a step of synthesis asks of a GPU, at the shapes of ViT-B: it may only become less, and the host never waits.

Two blocks, 16 images of 224 pixels, counted on fake tensors (`support/fake_cuda.py`), which also hold the memory of a
step to the estimate of `calibration.memory`. Whoever makes a step cheaper lowers its row of `LIMITS`.
"""

from __future__ import annotations

import pytest
import torch
from fake_cuda import fake_cuda
from fake_vit import BASE

from calibration.config import SynthesisConfig
from calibration.generator import Synthesizer
from calibration.memory import bytes_per_image
from fp8pipe.core.config import build_config

IMAGES, FREE = 16, 80 << 30
# Kernels, GB moved, GB held at most beside the model.
LIMITS = {
    "default": ({"start": "noise"}, 513, 8.67, 0.56),
    "published": ({"preset": "published"}, 399, 8.43, 0.65),
}


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_a_step_needs_no_more_of_a_gpu_than_before_and_holds_the_memory_that_was_estimated(monkeypatch):
    shapes, counted = BASE.structure(), {}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (FREE, FREE))
    with fake_cuda() as counter:
        vision = BASE.make()
        for name, (changes, *_) in LIMITS.items():
            config = build_config(SynthesisConfig, {**changes, "steps": 2})
            synthesizer = Synthesizer(vision, shapes, config, seed=0)
            counter.clear()
            held = counter.peak

            def on_step(step: int, name: str = name, held: int = held) -> None:
                if step == 2:  # the first makes what Adam remembers
                    waited = counter.syncs.total() + counter.uploads
                    sums = counter.kernels.total(), counter.traffic / 1e9, (counter.peak - held) / 1e9
                    counted[name] = waited, *sums
                counter.clear()

            synthesizer._optimise(list(range(IMAGES)), [0] * IMAGES, on_step)
            counted[name] += (bytes_per_image(shapes, config), synthesizer.at_once)
    for name, (_, *limits) in LIMITS.items():
        waited, *sums, estimated, at_once = counted[name]
        assert waited == 0
        assert all(now <= limit for now, limit in zip(sums, limits, strict=True)), counted
        held = sums[-1] * 1e9 / IMAGES
        assert held <= estimated <= 1.5 * held
        assert 0.5 * FREE < held * at_once < 0.8 * FREE
