"""Weights & Biases: a run in the project `WANDB_PROJECT`, online or offline as its own settings say.

Lines go by their own `step`, not by the library's counter of calls, which never goes back: images and training steps
are counted separately.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

from fp8pipe.models.compat import import_package
from pipeline.tracking.tracker import Ending, Figures, Subject

__all__ = ["WandbTracker"]

_PATIENCE_S: Final = 60.0  # for the upload of what is left at the end of a run
_EXIT_CODES: Final[Mapping[Ending, int]] = {"finished": 0, "failed": 1, "interrupted": 130}


class WandbTracker:
    """A run of Weights & Biases."""

    def __init__(self, subject: Subject, run: str | None) -> None:
        wandb = import_package("wandb", "wandb cannot be imported", "pip install 'fp8pipe[wandb]'")
        opened = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "fp8pipe"), name=subject.name, job_type=subject.stage, id=run,
            resume=None if run is None else "allow", config=dict(subject.config),
            settings=wandb.Settings(
                quiet=True, console="off",  # its capture would put itself between this process and its terminal
                finish_timeout=_PATIENCE_S, finish_timeout_raises=True,  # without, a server that is gone is waited for
            ),
        )  # fmt: skip
        opened.define_metric("*", step_metric="step")
        self._run = opened
        self.run = str(opened.id)
        self.place = str(opened.url or opened.dir)

    def log(self, step: int, figures: Figures) -> None:
        """See `Tracker`."""
        self._run.log({"step": step, **figures})

    def tag(self, facts: Mapping[str, str]) -> None:
        """See `Tracker`; the digest is also a tag, by which runs are found."""
        self._run.summary.update(dict(facts))
        self._run.tags = (*(self._run.tags or ()), facts["digest"])

    def close(self, ending: Ending) -> None:
        """See `Tracker`."""
        self._run.finish(exit_code=_EXIT_CODES[ending])
