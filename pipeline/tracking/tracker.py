"""What a tracker is: an open run of one of the libraries, which takes figures until the run ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

Figures = Mapping[str, Any]
Ending = Literal["finished", "failed", "interrupted"]


@dataclass(frozen=True, slots=True)
class Subject:
    """The run that is reported.

    Attributes:
        output: directory of the artifact that it will write; its name becomes that of the tracker's run.
        stage: `finetune` or `quantize-vit`.
        config: the resolved configuration, as JSON-compatible data.
    """

    output: Path
    stage: str
    config: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The name of the tracker's run."""
        return self.output.name


class Tracker(Protocol):
    """An open run of a tracker. Every method may raise whatever the library raises; `Reporter` deals with that.

    Attributes:
        run: what identifies the run, with which a resumed process continues it.
        place: where people find the run: a folder or an address.
    """

    run: str
    place: str

    def log(self, step: int, figures: Figures) -> None:
        """Report numbers by name, of one step."""

    def tag(self, facts: Mapping[str, str]) -> None:
        """Report facts about the finished artifact, by name."""

    def close(self, ending: Ending) -> None:
        """End the run."""
