"""The sections of a report, in reading order."""

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

# For each section: the function that makes the blocks; anchor, heading and lead; and the text if there are no blocks.
_SECTIONS: Final[tuple[tuple[Callable[[Subject], Iterator[Block]], str, str, str, Missing | None], ...]] = (
    (verdicts, "verdicts", "Verdicts", "Every gate, and whether it passed.", None),
    (training, "training", "Training", "The loss, and how much of the update reaches the FP8 codes.",
     Missing("There is no trained artifact here.", "fp8pipe finetune, or fp8pipe quantize-vit")),
    (by_layer, "layers", "The update, layer by layer",
     "What the final merge did to each layer: a column per decoder block; the most intense color is the largest value.",
     Missing("There is no artifact fine-tuned in FP8 here.", "fp8pipe finetune")),
    (pictures, "images", "Calibration images", "The images that the low-bit model was calibrated on.",
     Missing("Nothing here was calibrated with images: they are part of quantizing a vision transformer.",
             "fp8pipe quantize-vit")),
    (accuracy, "accuracy", "Accuracy", "The low-bit model against the model it was made from.", None),
    (parity, "parity", "Parity with the engine", "The engine's results against the artifact's.",
     Missing("There is no export, so there is no engine to compare with.", "fp8pipe export, then fp8pipe validate")),
    (precision, "precision", "Precision in the engine", "The precision in which each matrix multiplication runs.",
     Missing("There is no engine and no graph here.", "fp8pipe export ... --target trt, or --target onnx")),
    (speed, "speed", "Speed and size", "Measured against full precision, on the machine named with it.", None),
    (provenance, "provenance", "Provenance",
     "Each artifact names its parent by the digest of its manifest, which lists the digest of every file.",
     Missing("There is no artifact here.", "fp8pipe run")),
    (reproduce, "reproduce", "Versions and commands", "How to reproduce this.", None),
    (warnings, "warnings", "Warnings", "Fallbacks and findings that the stages recorded.", None),
)  # fmt: skip


def sections_of(subject: Subject) -> list[Section]:
    """All sections of the report, in order, with their blocks."""
    return [
        Section(key, title, lead, list(make(subject)) or ([missing] if missing else []))
        for make, key, title, lead, missing in _SECTIONS
    ]
