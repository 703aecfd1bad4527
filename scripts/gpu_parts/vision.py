"""Time and memory of `quantize-vit` for a ViT-B with random weights: image synthesis and distillation.

The model is the ViT of transformers, so timm is not needed. Random weights take the same time as trained ones.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from calibration.config import SynthesisConfig
from calibration.generator import Synthesizer
from fp8pipe.core.config import build_config
from fp8pipe.models.vision.architecture import Architecture, build
from fp8pipe.models.vision.preprocessing import Preprocessing
from fp8pipe.models.vision.sources import VisionModel
from fp8pipe.models.vision.structure import read_structure
from gpu_parts.context import Context
from gpu_parts.timing import peak_bytes, reset_peak, synchronize
from pipeline.vit.config import QuantizeVitConfig
from pipeline.vit.distill import Distiller
from pipeline.vit.stage import begin_student

_VIT_B: Final = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
    "image_size": 224, "patch_size": 16, "num_labels": 1000,
}  # fmt: skip
_TINY: Final = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8, "num_labels": 5,
}  # fmt: skip
_BITS: Final = "w4a8"


def run(context: Context) -> None:
    """Emit the rows of this part."""
    vision = _vision(context)
    context.row("synthesis", partial(_synthesis, vision, context), needs=0.0 if context.tiny else 20.0)
    context.row("distillation", partial(_distillation, vision, context), needs=0.0 if context.tiny else 20.0)


def _vision(context: Context) -> VisionModel:
    """The model with random weights, on the context's device."""
    shapes = _TINY if context.tiny else _VIT_B
    size = (shapes["image_size"], shapes["image_size"])
    architecture = Architecture(
        library="transformers", name="ViTForImageClassification", arguments=dict(shapes), image_size=size,
        classes=tuple(f"class {number}" for number in range(shapes["num_labels"])), head="classifier",
    )  # fmt: skip
    half = (0.5, 0.5, 0.5)
    preprocessing = Preprocessing(resize=size, crop=size, mean=half, std=half)
    vision = VisionModel.of(build(architecture).state_dict(), architecture, preprocessing, "random")
    return replace(vision, model=vision.model.to(context.device))


class _Steps:
    """A progress callback that records the time at which each step ends."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.ends = device, [time.perf_counter()]

    def __call__(self, *told: Any) -> None:
        synchronize(self.device)
        self.ends.append(time.perf_counter())

    def median(self, skipped: int = 2) -> float:
        """Median duration of a step in seconds, without the first `skipped` steps, which are warm-up."""
        steps = [b - a for a, b in zip(self.ends, self.ends[1:], strict=False)][skipped:]
        return float(torch.tensor(steps, dtype=torch.float64).median())

    def mean(self, skipped: int) -> float:
        """Mean duration of a step in seconds, without the first `skipped` steps.

        For work that reports several steps at once, for which single durations mean nothing.
        """
        return (self.ends[-1] - self.ends[skipped]) / (len(self.ends) - 1 - skipped)


def _synthesis(vision: VisionModel, context: Context) -> dict[str, Any]:
    """Measure the synthesis of one batch of images, with default settings except for the number of steps."""
    count, steps = (2, 4) if context.tiny else (16, 12)
    config = build_config(SynthesisConfig, {"steps": steps, "batch_size": count})
    structure = read_structure(vision.model, vision.architecture.image_size)
    synthesizer = Synthesizer(vision, structure, config, 0)
    reset_peak(context.device)
    ended = _Steps(context.device)
    images = synthesizer.batch(0, count, ended)
    full = build_config(SynthesisConfig, {}).steps
    return {
        "seconds": ended.median(), "images": count, "seconds_per_image": ended.median() * full / count,
        "steps_of_an_image": full, "peak_bytes": peak_bytes(context.device), "shape": list(images.images.shape),
    }  # fmt: skip


def _distillation(vision: VisionModel, context: Context) -> dict[str, Any]:
    """Measure distillation steps on random pixels.

    Weights are rounded to nearest, since compensated rounding happens once before distillation and not in each step.
    """
    count, steps = (4, 4) if context.tiny else (32, 48)
    distill = {"steps": steps, "batch_size": min(count, 16)}
    settings = {"model": "random", "bits": _BITS, "rounding": "nearest", "distill": distill}
    config = build_config(QuantizeVitConfig, settings)
    structure = read_structure(vision.model, vision.architecture.image_size)
    pixels: Tensor = torch.randn(count, 3, *structure.image_size, generator=torch.Generator().manual_seed(0))
    began = time.perf_counter()
    student = begin_student(config, vision, structure, pixels)
    started = time.perf_counter() - began
    distiller = Distiller(student, vision, structure, pixels, config.distill, 0)
    reset_peak(context.device)
    ended = _Steps(context.device)
    history = distiller.run(ended)
    return {
        "seconds": ended.mean(distiller.read_every), "images": config.distill.batch_size, "bits": _BITS,
        "start_seconds": started, "peak_bytes": peak_bytes(context.device),
        "losses": [history[0]["loss"], history[-1]["loss"]],
    }  # fmt: skip
