"""The context passed to each part: device, time limit, and a wrapper that measures and reports one row."""

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
    """Raised by the function that measures a row if it cannot be measured here; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Context:
    """The device, time limit and output of one part.

    Attributes:
        device: device to measure.
        tiny: whether to use small shapes and few rounds, to test the script.
        ends: `time.monotonic()` at which the part's process is killed.
        emit: called with each finished row.
    """

    device: torch.device
    tiny: bool
    ends: float
    emit: Callable[[Row], None]

    @property
    def on_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds until the part's process is killed."""
        return self.ends - time.monotonic()

    def row(self, name: str, find: Callable[[], dict[str, Any]], needs: float = 0.0) -> None:
        """Measure one row and emit its results, or the reason why there are none.

        Args:
            name: name of the row.
            find: measures the row; returns its figures. If it raises, the error is emitted instead.
            needs: estimated duration, seconds; if less time is left, the row is skipped.
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
        except Exception as error:  # recorded as the result of this row, so that the other rows are still measured
            found = {"error": _said(error), "where": traceback.format_exc(limit=-4)}
        self.emit({"name": name, **found, "took": round(time.monotonic() - began, 2)})
        if self.on_cuda:  # free the memory of this row's model for the next row
            gc.collect()
            torch.cuda.empty_cache()


def _said(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:400]}"
