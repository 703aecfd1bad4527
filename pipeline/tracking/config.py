"""The setting `report_to`, and the check that the named trackers are installed, which precedes everything long."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BeforeValidator, Field

from fp8pipe.core.errors import MissingCapabilityError
from fp8pipe.core.plan import Missing

TRACKERS: Final = ("mlflow", "tensorboard", "wandb")  # name of each is that of its package, and of our extra
REPORT_TO_HELP: Final = "Trackers that get the run's figures: mlflow, tensorboard, wandb; repeat it, or use commas."


def _split(value: Any) -> Any:
    """`mlflow,wandb`, `["mlflow", "wandb"]` and `["mlflow,wandb"]` mean the same."""
    if isinstance(value, str):
        value = [value]
    if not (isinstance(value, list | tuple) and all(isinstance(part, str) for part in value)):
        return value
    return tuple(dict.fromkeys(name.strip() for part in value for name in part.split(",") if name.strip()))


def _known(names: tuple[str, ...]) -> tuple[str, ...]:
    if unknown := [name for name in names if name not in TRACKERS]:
        raise ValueError(f"no such tracker: {', '.join(unknown)}; choose from {', '.join(TRACKERS)}")
    return names


# Left out of every dump, and so of manifests, their digests and checkpoints: no bit of an artifact depends on it.
ReportTo = Annotated[
    tuple[str, ...],
    BeforeValidator(_split, json_schema_input_type=str | list[str]),
    AfterValidator(_known),
    Field(exclude=True, description=REPORT_TO_HELP),
]


def missing_trackers(names: Sequence[str]) -> tuple[Missing, ...]:
    """An entry for each of these trackers whose package is not installed; the packages are not imported."""
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    return tuple(
        Missing(f"the package {name} is not installed", f"pip install 'fp8pipe[{name}]', or leave it out of report_to")
        for name in absent
    )


def require_trackers(names: Sequence[str]) -> None:
    """Make sure that the packages of these trackers are installed.

    Raises:
        MissingCapabilityError: at least one is not; the message names all of them.
    """
    if missing := missing_trackers(names):
        raise MissingCapabilityError(
            "a tracker that was asked for cannot be used",
            why="; ".join(item.what for item in missing),
            fix="; ".join(item.fix for item in missing),
        )
