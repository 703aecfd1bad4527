"""The whole net: do both sides choose the same class, and if not, was it a near-tie?

How close two logits must be to count as tied is measured, not chosen: torch runs again with the output of every
layer disturbed by what a correct engine may differ there. Noise in the pixels would not do, since the quantizer of
the first layer absorbs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from pydantic import Field
from torch import Tensor, nn

from exporters.graph.parity import INTEGER_TOLERANCE
from fp8pipe.core.config import FrozenConfig
from fp8pipe.models.vision.quantized import QuantizedVit

__all__ = ["ClassAgreement", "NearTie", "compare_classes", "measure_noise", "own_agreement"]

_RUNS: Final = 2
_BATCH: Final = 64
# Both logits of a pair may move by the noise, towards each other.
_NEAR_TIE_FACTOR: Final = 2.0


class NearTie(FrozenConfig):
    """An image whose class differs."""

    image: int = Field(ge=0, description="its number")
    expected_class: int = Field(description="the reference's choice")
    engine_class: int = Field(description="the engine's choice")
    margin: float = Field(description="how far the reference's logits of these two classes are apart")


class ClassAgreement(FrozenConfig):
    """The whole net on images, the reference against the engine."""

    images: int = Field(ge=0, description="images compared")
    source: str = Field(description="where they come from")
    agreeing: int = Field(ge=0, description="images with the same class (features: with the same largest feature)")
    largest_difference: float = Field(description="largest relative difference of an image's outputs (L2); NaN fails")
    near_tie: float = Field(description="largest margin that counts as a near-tie")
    disagreements: list[NearTie] = Field(description="images whose class differs")

    @property
    def clear_disagreements(self) -> list[NearTie]:
        """Those that are no near-ties."""
        return [found for found in self.disagreements if not found.margin <= self.near_tie]


def measure_noise(quantized: QuantizedVit, pixels: Tensor, expected: Tensor) -> float:
    """The largest margin that rounding errors may close: twice the largest change of an output in disturbed runs.

    `pixels` (N, 3, H, W) are normalized, and `expected` (N, C) are the outputs for them.

    Returns:
        In units of the outputs; 0 where no code is near enough to a border to change.
    """
    changes = [float((_disturbed(quantized, pixels, seed) - expected).abs().max()) for seed in range(_RUNS)]
    return _NEAR_TIE_FACTOR * max(changes)


def compare_classes(expected: Tensor, found: Tensor, near_tie: float, source: str) -> ClassAgreement:
    """Compare the reference's outputs `(N, C)` with an engine's; `near_tie` as of `measure_noise`."""
    relative = (found - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-30)
    ours, theirs = expected.argmax(1), found.argmax(1)
    differing = [
        NearTie(image=i, expected_class=int(a), engine_class=int(b), margin=float(expected[i, a] - expected[i, b]))
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True))
        if a != b
    ]
    return ClassAgreement(
        images=len(expected),
        source=source,
        agreeing=len(expected) - len(differing),
        largest_difference=float(relative.max()),
        near_tie=near_tie,
        disagreements=differing,
    )


def own_agreement(quantized: QuantizedVit, pixels: Tensor, expected: Tensor) -> float:
    """The share of images `(N, 3, H, W)` whose class the model keeps when its own layers are disturbed.

    What a model does not keep here, no engine can be asked to keep either: its sums round in another order.
    """
    parts = [_disturbed(quantized, batch, seed) for seed, batch in enumerate(torch.split(pixels, _BATCH))]
    return float((torch.cat(parts).argmax(1) == expected.argmax(1)).float().mean())


@torch.no_grad()
def _disturbed(quantized: QuantizedVit, pixels: Tensor, seed: int) -> Tensor:
    """The outputs when every layer's result is off by 1e-6 of its largest value, of random sign."""
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
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        signs = torch.randint(0, 2, output.shape, generator=random) * 2 - 1
        disturbed: Tensor = output + INTEGER_TOLERANCE * output.abs().max() * signs
        return disturbed

    return hook
