"""TensorBoard: event files beside the artifact, in a folder of their own for each run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime

from fp8pipe.models.compat import import_package
from pipeline.tracking.tracker import Ending, Figures, Subject

__all__ = ["TensorboardTracker"]


class TensorboardTracker:
    """Writes event files to `OUTPUT.tensorboard/RUN`, where RUN is the time at which the run began.

    They cannot be in the artifact, as its files are complete when its manifest is written.
    """

    def __init__(self, subject: Subject, run: str | None) -> None:
        library = import_package(
            "torch.utils.tensorboard", "tensorboard cannot be imported", "pip install 'fp8pipe[tensorboard]'"
        )
        self.run = run or datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
        self.place = str(subject.output.with_name(f"{subject.output.name}.tensorboard") / self.run)
        self._writer = library.SummaryWriter(self.place)
        if run is None:
            text = json.dumps({"stage": subject.stage, **subject.config}, indent=2)
            self._writer.add_text("config", f"```json\n{text}\n```")
            self._writer.flush()

    def log(self, step: int, figures: Figures) -> None:
        """See `Tracker`; flushed at once, as what is only queued is lost if the process is killed."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def tag(self, facts: Mapping[str, str]) -> None:
        """See `Tracker`."""
        for name, value in facts.items():
            self._writer.add_text(f"fp8pipe/{name}", value)

    def close(self, ending: Ending) -> None:
        """See `Tracker`; TensorBoard knows no endings."""
        self._writer.close()
