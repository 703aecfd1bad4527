"""What a part is given: where to measure, how long it has, and a guard around each row."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from gpu_parts.record import Row


class LeftOut(Exception):
    """A row that is not measured here, with the reason."""


@dataclass(frozen=True, slots=True)
class Context:
    """One part's surroundings.

    Attributes:
        device: where to measure.
        tiny: small shapes and few rounds.
        ends: `time.monotonic()` at which the part's process is ended.
        emit: takes a finished row.
    """

    device: torch.device
    tiny: bool
    ends: float
    emit: Callable[[Row], None]

    @property
    def on_cuda(self) -> bool:
        """Whether a GPU is measured."""
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds that remain."""
        return self.ends - time.monotonic()

    def row(self, name: str, find: Callable[[], dict[str, Any]], needs: float = 0.0) -> None:
        """Emit what `find` returns under a name; or why there is nothing.

        Args:
            name: of the row.
            find: measures it; whatever it raises is recorded, and the next row is tried.
            needs: seconds that it takes about; with less left it is not begun.
        """
        began = time.monotonic()
        if self.left() < needs:
            self.emit(
                {"name": name, "left_out": f"it takes about {needs:.0f} s, but only {self.left():.0f} s were left"}
            )
            return
        try:
            found = find()
        except LeftOut as reason:
            found = {"left_out": str(reason)}
        except Exception as error:  # a failure is a finding here, and must not take the other rows with it
            found = {"error": _said(error), "where": traceback.format_exc(limit=-4)}
        self.emit({"name": name, **found, "took": round(time.monotonic() - began, 2)})
        if self.on_cuda:  # a model that was measured, or did not fit, must not crowd the next one
            gc.collect()
            torch.cuda.empty_cache()


def _said(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:400]}"
