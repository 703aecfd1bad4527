"""Images that are finished early: one whose loss has stopped falling leaves the batch, and the others go on.

Every view is another one, so single losses jump; what is compared are means over two windows of steps. An image is
finished when the mean over the last window is not below the one before by at least the tolerance, relatively.

Only an image's own losses decide about it. Who leaves when is thus the same whenever the same batch is made, in a run
that was cut and resumed as in any other.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
        # Not `fall >= ...`: a comparison with NaN is false, and NaN is for the synthesizer to begin again.
        stays = ~(fall < self._tolerance * before.abs())
        self._history = [past[stays] for past in self._history]
        return stays
