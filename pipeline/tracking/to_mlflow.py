"""MLflow: a run in the experiment `MLFLOW_EXPERIMENT_NAME` of the server or store `MLFLOW_TRACKING_URI`.

The client is used, not MLflow's "active run", which belongs to the user's own script if one calls this package.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

from fp8pipe.core.version import __version__
from fp8pipe.models.compat import import_package
from pipeline.tracking.tracker import Ending, Figures, Subject

__all__ = ["MlflowTracker"]

# MLflow's own are 7 retries and 120 s each, during which training would stand still.
_PATIENCE: Final = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
_STATUS: Final[Mapping[Ending, str]] = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
_LONGEST_PARAMETER: Final = 500  # characters; some stores take no more


class MlflowTracker:
    """A run of MLflow, with the configuration as parameters."""

    def __init__(self, subject: Subject, run: str | None) -> None:
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        mlflow = import_package("mlflow", "mlflow cannot be imported", "pip install 'fp8pipe[mlflow]'")
        self._entities = mlflow.entities
        self._client = mlflow.MlflowClient()
        if run is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fp8pipe")
            found = self._client.get_experiment_by_name(name)
            experiment = self._client.create_experiment(name) if found is None else found.experiment_id
            tags = {"fp8pipe/stage": subject.stage, "fp8pipe/version": __version__}
            run = str(self._client.create_run(experiment, run_name=subject.name, tags=tags).info.run_id)
            parameters = [
                self._entities.Param(key, str(value)[:_LONGEST_PARAMETER]) for key, value in _flat(subject.config)
            ]
            self._client.log_batch(run, params=parameters)
        else:
            self._client.update_run(run, status="RUNNING")
        self.run = run
        self.place = f"run {run} at {mlflow.get_tracking_uri()}"

    def log(self, step: int, figures: Figures) -> None:
        """See `Tracker`."""
        now = time.time_ns() // 1_000_000
        self._client.log_batch(
            self.run, metrics=[self._entities.Metric(name, float(value), now, step) for name, value in figures.items()]
        )

    def tag(self, facts: Mapping[str, str]) -> None:
        """See `Tracker`."""
        tags = [self._entities.RunTag(f"fp8pipe/{name}", value) for name, value in facts.items()]
        self._client.log_batch(self.run, tags=tags)

    def close(self, ending: Ending) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self.run, _STATUS[ending])


def _flat(config: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The settings by dotted name."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
