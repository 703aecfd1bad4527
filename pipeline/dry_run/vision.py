"""A dry run of quantization: the real stage, model and batch size, with few images and few steps.

`pipeline.vit.plan` starts this module as a separate process.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from fp8pipe.core.config import build_config
from fp8pipe.core.plan import enter_phase
from fp8pipe.models.vision.sources import load_vision_model
from pipeline.dry_run.process import CheckpointMeter, perform
from pipeline.vit.config import QuantizeVitConfig
from pipeline.vit.evaluate import read_evaluation_folder
from pipeline.vit.stage import quantize

STEPS: Final = 2  # the first one allocates the optimizer state
PICTURES: Final = 64  # number of labelled images in the evaluation: one batch


def small(config: QuantizeVitConfig, images: int) -> QuantizeVitConfig:
    """A copy of the configuration with only `images` images and at most two steps of synthesis and of distillation."""
    synthesis = config.synthesis.model_copy(update={"steps": min(STEPS, config.synthesis.steps)})
    distill = config.distill.model_copy(update={"steps": min(STEPS, config.distill.steps), "save_every": 0})
    return config.model_copy(update={"images": images, "synthesis": synthesis, "distill": distill})


def run(job: dict[str, Any], output: Path) -> tuple[CheckpointMeter, dict[str, Any]]:
    """Run the quantization stage on few images and collect its measurements.

    Args:
        job: `config`, the fields of a `QuantizeVitConfig`, and `images`, the number of images.
        output: path of the artifact to write.

    Returns:
        The measurements by phase, and as a fact the number of labelled `pictures` in the real evaluation.
    """
    config = build_config(QuantizeVitConfig, job["config"])
    with CheckpointMeter(output.with_name(f"{output.name}.partial"), "deploy") as meter:
        enter_phase("load")
        vision = load_vision_model(config.model, config.size, activation=config.activation)
        pictures, count = None, 0
        if config.evaluate is not None:
            folder = read_evaluation_folder(config.evaluate, vision.architecture.choices)
            count = len(folder.files)
            pictures = replace(folder, files=folder.files[:PICTURES], labels=folder.labels[:PICTURES])
        quantize(small(config, job["images"]), vision, pictures, output)
    return meter, {"pictures": count}


if __name__ == "__main__":
    sys.exit(perform(run))
