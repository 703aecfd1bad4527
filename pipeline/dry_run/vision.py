"""Rehearses a quantization run: the real stage and model, few images and few steps; batches are the real ones.

Started as a process of its own by `pipeline.vit.plan`.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Final

from fp8pipe.core.config import build_config
from fp8pipe.core.phases import PhaseMeter, enter_phase
from fp8pipe.models.vision.image_folder import ImageFolder
from fp8pipe.models.vision.sources import load_vision_model
from fp8pipe.numerics.bf16 import widen_bf16_products
from pipeline.dry_run.process import answer, perform, read_job, size_of
from pipeline.finetune.checkpoint import CheckpointStore
from pipeline.vit.config import QuantizeVitConfig
from pipeline.vit.evaluate import read_evaluation_folder
from pipeline.vit.stage import quantize

STEPS: Final = 2  # the first makes the optimizer's state
PICTURES: Final = 64  # of an evaluation: one batch


def small(config: QuantizeVitConfig, images: int) -> QuantizeVitConfig:
    """The configuration with `images` images and few steps."""
    synthesis = config.synthesis.model_copy(update={"steps": min(STEPS, config.synthesis.steps)})
    distill = config.distill.model_copy(update={"steps": min(STEPS, config.distill.steps), "save_every": 0})
    return config.model_copy(update={"images": images, "synthesis": synthesis, "distill": distill})


class _Watched(PhaseMeter):
    """Also looks at images and checkpoints before they are removed."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self._root = root
        self.sizes: dict[str, int] = {"step": 0, "work": 0}

    def enter(self, name: str) -> None:
        """End the phase that goes on, and begin `name`."""
        super().enter(name)
        if name != "deploy":
            return
        store = CheckpointStore(self._root / "checkpoints", keep=1)
        self.sizes["step"] = sum(size_of(store.root / f"step-{step:08d}") for step in store.steps())
        self.sizes["work"] = size_of(self._root) - self.sizes["step"]


def _few(folder: ImageFolder) -> ImageFolder:
    return replace(folder, files=folder.files[:PICTURES], labels=folder.labels[:PICTURES])


def main(folder: Path) -> None:
    """Rehearse the job in `folder`: `config` and the number of `images`."""
    import fp8pipe.cli  # noqa: F401 (the real run holds it, too)

    job = read_job(folder)
    config = build_config(QuantizeVitConfig, job["config"])
    output = folder / "artifact"
    meter = _Watched(output.with_name(f"{output.name}.partial"))
    with meter:
        widen_bf16_products()
        enter_phase("load")
        vision = load_vision_model(config.model)
        classes = vision.architecture.classes
        pictures = None if config.evaluate is None else read_evaluation_folder(config.evaluate, classes)
        count = 0 if pictures is None else len(pictures.files)
        few = None if pictures is None else _few(pictures)
        artifact = quantize(small(config, job["images"]), vision, few, output)
    answer(folder, meter, {**meter.sizes, "output": size_of(artifact.root)}, {"pictures": count})


if __name__ == "__main__":
    sys.exit(perform(main))
