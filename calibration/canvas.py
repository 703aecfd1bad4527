"""The parameters of an optimised image: its pixels, or a pyramid of corrections that are added to a start image.

Adam on individual pixels produces fine patterns that no photograph has, because all spatial frequencies have the same
learning rate. A pyramid sums layers of successively halved resolution, so that coarse changes take few parameters and
few steps, while fine ones follow more slowly. Its colour axes are brightness and two weaker chroma axes, as in
photographs. The result shows objects rather than textures. (For this kind of preconditioning see "Feature
Visualization", Distill 2017.)

Every parameter belongs to one image, and Adam is elementwise, so an image does not depend on the others in its batch.
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
_FINER: Final = 0.8  # factor on the learning rate for each finer layer
_LEAK: Final = 0.01  # fraction of the gradient kept for pixels out of range, so that they can return
# Brightness; blue against yellow; green against magenta.
_COLOURS: Final = ((1.0, 1.0, 1.0), (0.25, 0.05, -0.25), (0.08, -0.16, 0.08))


class Canvas(ABC):
    """A batch of images that is being optimised, with the state of its AdamW optimizer.

    Subclasses are constructed from `start`, `(N, 3, H, W)` normalized pixels, and `limits`, the smallest and largest
    valid values, each broadcastable to `start`; None means no limits.

    Attributes:
        parameters: the optimised tensors, which require gradients.
    """

    parameters: list[Tensor]

    def __init__(self, parameters: list[Tensor], rates: list[float], beta2: float) -> None:
        self.parameters = [parameter.requires_grad_() for parameter in parameters]
        self._rates, self._beta2, self._steps = rates, beta2, 0
        self._first = [torch.zeros_like(p) for p in parameters]
        self._second = [torch.zeros_like(p) for p in parameters]

    @abstractmethod
    def pixels(self) -> Tensor:
        """The current images, `(N, 3, H, W)` fp32, normalized, differentiable with respect to the parameters."""

    def keep(self, rows: Tensor) -> None:
        """Keep only the selected images: a boolean mask `(N,)` or indices, on the device of the parameters."""
        self.parameters = [p.detach()[rows].requires_grad_() for p in self.parameters]
        self._first = [moment[rows] for moment in self._first]
        self._second = [moment[rows] for moment in self._second]

    @torch.no_grad()
    def step(self, gradients: tuple[Tensor, ...], rate: float) -> None:
        """One step of AdamW (arXiv 1711.05101).

        Args:
            gradients: the gradients of `parameters`, in the same order.
            rate: the learning rate; each parameter scales it by its own factor.
        """
        self._steps += 1
        ahead, behind = 1 - _BETA1**self._steps, 1 - self._beta2**self._steps
        for index, (parameter, gradient) in enumerate(zip(self.parameters, gradients, strict=True)):
            first, second, own = self._first[index], self._second[index], rate * self._rates[index]
            first.lerp_(gradient, 1 - _BETA1)
            second.mul_(self._beta2).addcmul_(gradient, gradient, value=1 - self._beta2)
            divisor = (second / behind).sqrt_().add_(_EPSILON)
            parameter.mul_(1 - own * _DECAY).addcdiv_(first, divisor, value=-own / ahead)


class Pixels(Canvas):
    """Images whose pixels are the parameters, as in the published method; `start` is used without a copy."""

    def __init__(self, start: Tensor, limits: tuple[Tensor, Tensor] | None) -> None:
        super().__init__([start], [1.0], beta2=0.999)
        self._limits = limits

    def pixels(self) -> Tensor:
        """The parameters themselves, `(N, 3, H, W)`."""
        return self.parameters[0]

    @torch.no_grad()
    def step(self, gradients: tuple[Tensor, ...], rate: float) -> None:
        """One optimizer step, after which pixels are clamped to the valid range."""
        super().step(gradients, rate)
        if self._limits is not None:
            self.parameters[0].clamp_(*self._limits)


class Pyramid(Canvas):
    """Images whose parameters are layers of successively halved resolution, added to a fixed start image."""

    def __init__(self, start: Tensor, limits: tuple[Tensor, Tensor] | None) -> None:
        sizes = layer_sizes(start.shape[2], start.shape[3])
        layers = [torch.zeros(start.shape[0], 3, *size, device=start.device) for size in sizes]
        # A low beta2, as gradients vary a lot between randomly zoomed views.
        super().__init__(layers, [_FINER**i for i in range(len(sizes))], beta2=0.99)
        self._start, self._limits, self._colours = start, limits, torch.tensor(_COLOURS).to(start.device)
        height, width = start.shape[2:]
        axes = [(enlargement(h, height), enlargement(w, width).T) for h, w in sizes[:-1]]
        self._enlarge = [(rows.to(start.device), columns.to(start.device)) for rows, columns in axes]

    def keep(self, rows: Tensor) -> None:
        """Keep only the selected images."""
        super().keep(rows)
        self._start = self._start[rows]

    def pixels(self) -> Tensor:
        """The start image plus all layers.

        Pixels beyond the valid range are clamped, except that 1 % of the excess remains, so that they keep a gradient.
        """
        change = self.parameters[-1]
        for layer, (rows, columns) in zip(self.parameters, self._enlarge, strict=False):
            change = change + rows @ layer @ columns
        image = self._start + torch.einsum("nkhw,kc->nchw", change, self._colours)
        if self._limits is None:
            return image
        inside = image.clamp(*self._limits)
        return inside + _LEAK * (image - inside)


def enlargement(small: int, large: int) -> Tensor:
    """The matrix `(large, small)` that upsamples one axis bicubically.

    Multiplying by two such matrices takes a tenth of the time of `interpolate`.
    """
    unit = torch.eye(small)[None, None]
    return functional.interpolate(unit, size=(large, small), mode="bicubic", align_corners=False)[0, 0]


def layer_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """(height, width) of a pyramid's layers, coarsest first; the last has the image's full size."""
    sizes = [(height, width)]
    while min(sizes[-1]) > _COARSEST:
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    return sizes[::-1]


def open_canvas(start: Tensor, limits: tuple[Tensor, Tensor], config: SynthesisConfig) -> Canvas:
    """Create the configured kind of canvas, on the device of `start`; see `Canvas` for the arguments."""
    kind = Pyramid if config.canvas == "pyramid" else Pixels
    return kind(start, (limits[0].to(start.device), limits[1].to(start.device)) if config.clamp else None)
