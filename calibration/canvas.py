"""How an image being optimised is parametrized: by its pixels, or by a pyramid of corrections on a start image.

Adam on single pixels answers a vision transformer with fine patterns that no photograph has, because all frequencies
learn at one rate. A pyramid adds up layers of halving resolution, so a broad change takes few parameters and few steps
while fine ones follow more slowly; and its colours are brightness and two weak chroma axes, as in photographs. What
appears then are objects rather than textures. (Preconditioning of this kind: "Feature Visualization", Distill 2017.)

All parameters are an image's own and Adam works on each number alone, so images do not depend on their company.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from calibration.config import SynthesisConfig

_BETA1: Final = 0.9
_EPSILON: Final = 1e-8
_DECAY: Final = 1e-6
_COARSEST: Final = 4  # side of the smallest layer
_FINER: Final = 0.8  # how much more slowly each finer layer learns
_LEAK: Final = 0.01  # gradient that is left to a pixel beyond its range, so that it can come back
# Brightness; blue against yellow; green against magenta.
_COLOURS: Final = ((1.0, 1.0, 1.0), (0.25, 0.05, -0.25), (0.08, -0.16, 0.08))


class Canvas(ABC):
    """A batch of images being optimised.

    Its kinds take `start`, `(N, 3, H, W)` normalized pixels, and `limits`, the smallest and largest valid pixel, each
    broadcastable to `start`; None leaves pixels free.

    Attributes:
        parameters: what is optimised; tensors that want gradients.
    """

    parameters: list[Tensor]

    def __init__(self, parameters: list[Tensor], rates: list[float], beta2: float) -> None:
        self.parameters = [parameter.requires_grad_() for parameter in parameters]
        self._rates, self._beta2, self._steps = rates, beta2, 0
        self._first = [torch.zeros_like(p) for p in parameters]
        self._second = [torch.zeros_like(p) for p in parameters]

    @abstractmethod
    def pixels(self) -> Tensor:
        """The images as they are, `(N, 3, H, W)` fp32 in normalized units, differentiable in the parameters."""

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the images: boolean `(N,)`, or their indices, on the device of the parameters."""
        self.parameters = [p.detach()[rows].requires_grad_() for p in self.parameters]
        self._first = [moment[rows] for moment in self._first]
        self._second = [moment[rows] for moment in self._second]

    @torch.no_grad()
    def step(self, gradients: tuple[Tensor, ...], rate: float) -> None:
        """One step of AdamW (arXiv 1711.05101)."""
        self._steps += 1
        ahead, behind = 1 - _BETA1**self._steps, 1 - self._beta2**self._steps
        for index, (parameter, gradient) in enumerate(zip(self.parameters, gradients, strict=True)):
            first, second, own = self._first[index], self._second[index], rate * self._rates[index]
            first.lerp_(gradient, 1 - _BETA1)
            second.mul_(self._beta2).addcmul_(gradient, gradient, value=1 - self._beta2)
            divisor = (second / behind).sqrt_().add_(_EPSILON)
            parameter.mul_(1 - own * _DECAY).addcdiv_(first, divisor, value=-own / ahead)


class Pixels(Canvas):
    """Every pixel for itself, as published; the start is taken over."""

    def __init__(self, start: Tensor, limits: tuple[Tensor, Tensor] | None) -> None:
        super().__init__([start], [1.0], beta2=0.999)
        self._limits = limits

    def pixels(self) -> Tensor:
        """The parameters themselves."""
        return self.parameters[0]

    @torch.no_grad()
    def step(self, gradients: tuple[Tensor, ...], rate: float) -> None:
        """One step; then pixels are those of a valid image again."""
        super().step(gradients, rate)
        if self._limits is not None:
            self.parameters[0].clamp_(*self._limits)


class Pyramid(Canvas):
    """Layers of halving resolution on a fixed start."""

    def __init__(self, start: Tensor, limits: tuple[Tensor, Tensor] | None) -> None:
        sizes = layer_sizes(start.shape[2], start.shape[3])
        layers = [torch.zeros(start.shape[0], 3, *size, device=start.device) for size in sizes]
        # A short memory: gradients of views that are zoomed at random change a lot.
        super().__init__(layers, [_FINER**i for i in range(len(sizes))], beta2=0.99)
        self._start, self._limits, self._colours = start, limits, torch.tensor(_COLOURS).to(start.device)
        height, width = start.shape[2:]
        axes = [(enlargement(h, height), enlargement(w, width).T) for h, w in sizes[:-1]]
        self._enlarge = [(rows.to(start.device), columns.to(start.device)) for rows, columns in axes]

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the images."""
        super().keep(rows)
        self._start = self._start[rows]

    def pixels(self) -> Tensor:
        """Start plus all layers, kept (nearly) in range."""
        change = self.parameters[-1]
        for layer, (rows, columns) in zip(self.parameters, self._enlarge, strict=False):
            change = change + rows @ layer @ columns
        image = self._start + torch.einsum("nkhw,kc->nchw", change, self._colours)
        if self._limits is None:
            return image
        inside = image.clamp(*self._limits)
        return inside + _LEAK * (image - inside)


def enlargement(small: int, large: int) -> Tensor:
    """Bicubic enlargement of one axis, `(large, small)`: as two matrix products it costs a tenth of the operator."""
    unit = torch.eye(small)[None, None]
    return functional.interpolate(unit, size=(large, small), mode="bicubic", align_corners=False)[0, 0]


def layer_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """Sizes of a pyramid's layers, coarsest first; the last is the image's own."""
    sizes = [(height, width)]
    while min(sizes[-1]) > _COARSEST:
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    return sizes[::-1]


def open_canvas(start: Tensor, limits: tuple[Tensor, Tensor], config: SynthesisConfig) -> Canvas:
    """The canvas that a configuration asks for, on the device of `start`."""
    kind = Pyramid if config.canvas == "pyramid" else Pixels
    return kind(start, (limits[0].to(start.device), limits[1].to(start.device)) if config.clamp else None)
