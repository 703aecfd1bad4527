"""Images that are optimised together, each with everything that is its own; some may leave before the others."""

from __future__ import annotations

import torch
from torch import Tensor

from calibration.canvas import Canvas
from calibration.config import SynthesisConfig
from calibration.plateau import Plateau
from calibration.regions import Regions, cut, draw_choice
from calibration.streams import uniform
from calibration.terms import Scene
from calibration.views import view_with_maps


class Batch:
    """A batch under way.

    Args:
        config: which views and terms.
        grid: rows and columns of patches.
        layers: attentions that have priors, in the order of `priors`.
        streams: one an image.
        labels: `(N,)` int64.
        canvas: of all images.
        regions: classes of quarters, or None.
        priors: `(N, layers, heads, rows, columns)`, or None.

    Attributes:
        rows: `(n,)` int64: which of the images it began with are still here.
        labels: of all images it began with.
    """

    def __init__(
        self,
        config: SynthesisConfig,
        grid: tuple[int, int],
        layers: list[str],
        streams: list[torch.Generator],
        labels: Tensor,
        canvas: Canvas,
        regions: Regions | None,
        priors: Tensor | None,
    ) -> None:
        self.rows, self.labels, self.canvas = torch.arange(len(streams)), labels, canvas
        self.plateau = Plateau(config.plateau, config.plateau_window)
        self._config, self._grid, self._layers = config, grid, layers
        self._streams, self._regions, self._priors = streams, regions, priors

    def scene(self, step: int) -> Scene:
        """What step number `step` looks at; draws from the streams."""
        config, pixels = self._config, self.canvas.pixels()
        shown, targets = pixels, self.labels[self.rows]
        maps = None if self._priors is None else self._priors.flatten(1, 2)
        if self._regions is not None:
            choice = draw_choice(self._streams, config.regions)
            shown, targets = cut(shown, choice), self._regions.chosen(choice)
            maps = None if maps is None else cut(maps, choice)
        shown, maps = view_with_maps(shown, maps, self._streams, step, config)
        draws = uniform(self._streams, self._grid[0] * self._grid[1]) if config.masked else None
        return Scene(pixels, shown, targets, step / config.steps, self._by_layer(maps), draws)

    def _by_layer(self, maps: Tensor | None) -> dict[str, Tensor]:
        if maps is None:
            return {}
        parts = maps.unflatten(1, (len(self._layers), -1)).flatten(3)  # (N, L, H, P)
        return {name: parts[:, i] for i, name in enumerate(self._layers)}

    def keep(self, stays: Tensor) -> None:
        """Go on with the images of which the boolean `(n,)` is true."""
        self.rows = self.rows[stays]
        self.canvas.keep(stays)
        self._streams = [stream for stream, here in zip(self._streams, stays.tolist(), strict=True) if here]
        if self._regions is not None:
            self._regions = self._regions.keep(stays)
        if self._priors is not None:
            self._priors = self._priors[stays]
