"""A batch of images being optimised, each with a random stream of its own; finished ones leave before the others.

An image whose loss has stopped falling is finished early. Every view is another one, so single losses jump; what is
compared are means over two windows of steps. An image is finished when the mean over the last window is not below the
one before by at least the tolerance, relatively. Only an image's own losses decide about it, so who leaves when is the
same whenever the same batch is made, in a run that was cut and resumed as in any other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from calibration.canvas import Canvas
from calibration.config import SynthesisConfig
from calibration.regions import cut, draw_choice
from calibration.streams import uniform
from calibration.terms import Scene
from calibration.views import view


@dataclass(slots=True)
class Batch:
    """A batch under way.

    Attributes:
        config: which views and terms.
        grid: rows and columns of patches.
        layers: attentions that have priors, in the order of `priors`.
        streams: one per image.
        labels: `(N,)` int64, of all images it began with.
        canvas: of all images that are still here.
        regions: targets of wholes and quarters, see `draw_regions`, or None.
        priors: `(N, layers, heads, rows, columns)`, or None.
        rows: `(n,)` int64: which of the images it began with are still here.
    """

    config: SynthesisConfig
    grid: tuple[int, int]
    layers: list[str]
    streams: list[torch.Generator]
    labels: Tensor
    canvas: Canvas
    regions: Tensor | None
    priors: Tensor | None
    rows: Tensor = field(init=False)
    plateau: Plateau = field(init=False)

    def __post_init__(self) -> None:
        self.rows = torch.arange(len(self.streams))
        self.plateau = Plateau(self.config.plateau, self.config.plateau_window)

    def scene(self, step: int) -> Scene:
        """What step number `step` looks at; draws from the streams."""
        config, pixels = self.config, self.canvas.pixels()
        shown, targets = pixels, self.labels[self.rows]
        maps = None if self.priors is None else self.priors.flatten(1, 2)
        if self.regions is not None:
            choice = draw_choice(self.streams, config.regions)
            shown, targets = cut(shown, choice), self.regions[torch.arange(len(choice)), choice]
            maps = None if maps is None else cut(maps, choice)
        shown, maps = view(shown, maps, self.streams, step, config)
        draws = uniform(self.streams, self.grid[0] * self.grid[1]) if config.masked else None
        return Scene(pixels, shown, targets, step / config.steps, self._by_layer(maps), draws)

    def _by_layer(self, maps: Tensor | None) -> dict[str, Tensor]:
        if maps is None:
            return {}
        parts = maps.unflatten(1, (len(self.layers), -1)).flatten(3)  # (N, L, H, P)
        return {name: parts[:, i] for i, name in enumerate(self.layers)}

    def keep(self, stays: Tensor) -> None:
        """Go on with the images of which the boolean `(n,)` is true."""
        self.rows = self.rows[stays]
        self.canvas.keep(stays)
        self.streams = [stream for stream, here in zip(self.streams, stays.tolist(), strict=True) if here]
        self.regions = None if self.regions is None else self.regions[stays]
        self.priors = None if self.priors is None else self.priors[stays]


class Plateau:
    """Watches the losses of a batch.

    Args:
        tolerance: least relative fall from window to window; 0 lets nobody leave.
        window: steps a window has.
    """

    def __init__(self, tolerance: float, window: int) -> None:
        self._tolerance, self._window = tolerance, window
        self._history: list[Tensor] = []

    def going(self, losses: Tensor) -> Tensor:
        """Which images go on, boolean `(N,)`; those that do not are forgotten.

        Args:
            losses: `(N,)` of this step, of the images that went on before. A loss that is not finite goes on.
        """
        self._history = [*self._history, losses.detach().clone()][-2 * self._window :]
        if not self._tolerance or len(self._history) < 2 * self._window:
            return torch.ones_like(losses, dtype=torch.bool)
        before = torch.stack(self._history[: self._window]).mean(0)
        fall = before - torch.stack(self._history[self._window :]).mean(0)
        # Not `fall >= ...`: a comparison with NaN is false, and the synthesizer starts an image with NaN again.
        stays = ~(fall < self._tolerance * before.abs())
        self._history = [past[stays] for past in self._history]
        return stays
