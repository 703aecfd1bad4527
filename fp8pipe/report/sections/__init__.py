"""The sections of a report, in the order in which they are read."""

from collections.abc import Callable, Iterator
from typing import Final

from fp8pipe.report.blocks import Block, Missing, Section
from fp8pipe.report.sections.engine import precision, speed
from fp8pipe.report.sections.origin import provenance, reproduce
from fp8pipe.report.sections.pictures import pictures
from fp8pipe.report.sections.quality import accuracy, parity
from fp8pipe.report.sections.training import by_layer, training
from fp8pipe.report.sections.verdicts import verdicts, warnings
from fp8pipe.report.subject import Subject

__all__ = ["sections_of"]

# What makes the blocks; anchor, heading and lead; and what is said where there are no blocks.
_SECTIONS: Final[tuple[tuple[Callable[[Subject], Iterator[Block]], str, str, str, Missing | None], ...]] = (
    (verdicts, "verdicts", "Verdicts", "What was asked of this work, and whether it holds.", None),
    (training, "training", "Training", "The loss, and what becomes of the update on its way into the codes.",
     Missing("No artifact that was trained is here.", "fp8pipe finetune, or fp8pipe quantize-vit")),
    (by_layer, "layers", "The update, layer by layer",
     "What the last flush did to each layer; a column is a block of the model, the strongest square the largest value.",
     Missing("No artifact that was tuned in FP8 is here.", "fp8pipe finetune")),
    (pictures, "images", "Calibration images", "What the low-bit model was fitted to.",
     Missing("Nothing here was calibrated with images: they are part of quantizing a vision transformer.",
             "fp8pipe quantize-vit")),
    (accuracy, "accuracy", "Accuracy", "The low-bit model beside the one it was made from.", None),
    (parity, "parity", "Parity with the engine", "The engine's results beside the artifact's.",
     Missing("There is no export, so there is no engine to compare with.", "fp8pipe export, then fp8pipe validate")),
    (precision, "precision", "Precision in the engine", "What each product is really multiplied in.",
     Missing("No engine and no graph is here.", "fp8pipe export ... --target trt, or --target onnx")),
    (speed, "speed", "Speed and size", "Measured beside full precision, on the machine named with it.", None),
    (provenance, "provenance", "Provenance",
     "A child names its parent by digest. A digest covers every file, since the manifest lists theirs.",
     Missing("No artifact is here.", "fp8pipe run")),
    (reproduce, "reproduce", "Versions and commands", "What it takes to do this again.", None),
    (warnings, "warnings", "Warnings", "Fallbacks and findings that the stages recorded.", None),
)  # fmt: skip


def sections_of(subject: Subject) -> list[Section]:
    """All of them, filled."""
    return [
        Section(key, title, lead, list(make(subject)) or ([missing] if missing else []))
        for make, key, title, lead, missing in _SECTIONS
    ]
