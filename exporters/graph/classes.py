"""Compares outputs and classes of the whole model, in addition to the layers and the operators between them.

A quantized transformer is chaotic, so even two correct engines differ at the output. How far depends only on the model
and is measured on it alone: torch runs again with the output of every layer perturbed by as much as a correct engine
may differ there, and the changed classes are counted. Noise in the pixels would not work, because the quantizer of the
first layer absorbs it. The engine's results never affect a bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import torch
from pydantic import Field
from torch import Tensor, nn

from exporters.graph.parity import INTEGER_TOLERANCE
from fp8pipe.artifact import Comparison, Gate
from fp8pipe.core.config import FrozenConfig
from fp8pipe.models.vision.answers import Activation, agreeing, ranks
from fp8pipe.models.vision.quantized import QuantizedVit

__all__ = ["ClassAgreement", "Disagreement", "class_gates", "compare_classes", "own_agreement"]

_BATCH: Final = 64
# The required share of images with the reference's class. If the model itself keeps fewer of its classes, its own share
# less three standard errors, but never less than the floor: below it correct and wrong engines look the same.
_LEAST, _FLOOR, _STANDARD_ERRORS = 0.995, 0.9, 3.0
# With few images, one or two may be close to a decision boundary without the model being chaotic.
_FREE_IMAGES: Final = 2
# Norm of the difference over the norm of the outputs, over all images. Correct engines stay below 0.1 if the model
# keeps nine of ten classes; outputs of a different model are at 1.
_LARGEST_DIFFERENCE: Final = 0.25


class Disagreement(FrozenConfig):
    """An image whose class or output differs."""

    image: int = Field(ge=0, description="index of the image")
    expected_class: int | None = Field(default=None, description="class chosen by the reference; none without classes")
    engine_class: int | None = Field(default=None, description="class chosen by the engine; none without classes")
    margin: float = Field(
        description="difference of the reference's logits of these two classes; without classes the largest "
        "difference of an output"
    )


class ClassAgreement(FrozenConfig):
    """Comparison of the whole model on images: the reference against the engine."""

    images: int = Field(ge=0, description="images compared")
    source: str = Field(description="where the images come from")
    ranked: bool = Field(default=True, description="true if classes are compared, false if outputs are")
    agreeing: int = Field(
        ge=0,
        description="images with the same class; without classes, those whose outputs differ by less than half of "
        "the difference between images; NaN agrees with nothing",
    )
    difference: float = Field(description="norm of the outputs' difference over the norm of the outputs; NaN fails")
    largest_difference: float = Field(description="largest relative difference of one image's outputs (L2)")
    own: float = Field(
        description="share of images whose class in the reference is unchanged when each layer is perturbed by 1e-6"
    )
    disagreements: list[Disagreement] = Field(description="images whose class differs")

    @property
    def allowed(self) -> int:
        """Number of images that may have another class; it depends only on the reference."""
        chaos = self.images * (1 - self.own)
        chaos += _STANDARD_ERRORS * math.sqrt(self.images * self.own * (1 - self.own))
        lowered = min(chaos, (1 - _FLOOR) * self.images)
        return max(_FREE_IMAGES, int((1 - _LEAST) * self.images), int(lowered + 1e-9))

    @property
    def lowered(self) -> str:
        """A sentence that says why the required agreement was lowered; empty if it was not."""
        if self.allowed <= max(_FREE_IMAGES, int((1 - _LEAST) * self.images)):
            return ""
        return (
            f"{'classes' if self.ranked else 'outputs'}: the reference model itself keeps {self.own:.1%} of them on "
            f"{self.source} when each layer is "
            f"perturbed by 1e-6, so {1 - self.allowed / self.images:.1%} were required of the "
            f"engine instead of {_LEAST:.1%}"
        )


def compare_classes(
    expected: Tensor, found: Tensor, own: float, source: str, activation: Activation = "softmax"
) -> ClassAgreement:
    """Compare the reference's outputs `(N, C)` with an engine's.

    Args:
        expected: outputs of the reference.
        found: outputs of the engine.
        own: result of `own_agreement`.
        source: where the images come from, for reports.
        activation: function that turns the outputs into probabilities.
    """
    relative = (found - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-30)
    ranked = ranks(activation, expected.shape[1])
    differing = [
        _disagreement(i, expected[i], found[i], ranked)
        for i, same in enumerate(agreeing(expected, found, activation).tolist())
        if not same
    ]
    return ClassAgreement(
        images=len(expected), source=source, ranked=ranked, agreeing=len(expected) - len(differing), own=own,
        difference=float((found - expected).norm() / expected.norm().clamp(min=1e-30)),
        largest_difference=float(relative.max()), disagreements=differing,
    )  # fmt: skip


def _disagreement(image: int, expected: Tensor, found: Tensor, ranked: bool) -> Disagreement:
    if not ranked:
        return Disagreement(image=image, margin=float((found - expected).abs().max()))
    a, b = int(expected.argmax()), int(found.argmax())
    return Disagreement(image=image, expected_class=a, engine_class=b, margin=float(expected[a] - expected[b]))


def class_gates(agreement: ClassAgreement) -> list[Gate]:
    """Gates on outputs and classes of the whole model, with bounds that do not depend on the engine."""
    images, ties = agreement.images, agreement.disagreements
    detail = (
        f"{agreement.agreeing} of {images} {agreement.source}; {agreement.lowered or 'the reference is not chaotic'}"
    )
    if ties:
        detail += f"; margins where the classes differ: {', '.join(f'{tie.margin:.2g}' for tie in ties[:5])}"
    return [
        Gate(
            name="difference of outputs", value=agreement.difference, comparison=Comparison.AT_MOST,
            threshold=_LARGEST_DIFFERENCE, detail=f"norm of the difference over norm of the outputs, {images} images; "
            f"the largest of one image is "
            f"{agreement.largest_difference:.1e}",
        ),
        Gate(
            name="top-1 agreement" if agreement.ranked else "agreement of outputs",
            value=agreement.agreeing / images, comparison=Comparison.AT_LEAST,
            threshold=(images - agreement.allowed) / images, detail=detail,
        ),
    ]  # fmt: skip


def own_agreement(quantized: QuantizedVit, pixels: Tensor, expected: Tensor) -> float:
    """The share of images `(N, 3, H, W)` whose class or output the model keeps when its own layers are perturbed.

    An engine cannot be expected to keep more than that: it sums in a different order.
    """
    parts = [_disturbed(quantized, batch, seed) for seed, batch in enumerate(torch.split(pixels, _BATCH))]
    return float(agreeing(expected, torch.cat(parts), quantized.architecture.activation).float().mean())


@torch.no_grad()
def _disturbed(quantized: QuantizedVit, pixels: Tensor, seed: int) -> Tensor:
    """The outputs when the result of every layer is off by 1e-6 of its largest value, with random signs."""
    random = torch.Generator().manual_seed(seed)
    layers = [quantized.model.get_submodule(name) for name in quantized.structure.linear_names]
    handles = [layer.register_forward_hook(_disturb(random)) for layer in layers]
    try:
        outputs: Tensor = quantized(pixels)
        return outputs
    finally:
        for handle in handles:
            handle.remove()


def _disturb(random: torch.Generator) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    # A forward hook that adds 1e-6 of the largest output to every output, with random signs.
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        signs = torch.randint(0, 2, output.shape, generator=random) * 2 - 1
        disturbed: Tensor = output + INTEGER_TOLERANCE * output.abs().max() * signs
        return disturbed

    return hook
