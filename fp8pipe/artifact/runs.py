"""The record of a run of a recipe: which stage made what, from what, how long it took, and what the gates said.

The workflow writes it after every stage, in one step; `verify`, `report` and a second run read it. It lies in the run's
directory, beside the stages' outputs, whose digests it holds.
"""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from fp8pipe.artifact.checksum import read_sealed, write_sealed
from fp8pipe.core.config import FrozenConfig
from fp8pipe.core.errors import BadArtifactError

__all__ = ["RUN_NAME", "GateOutcome", "RunRecord", "StageRecord", "Verdict", "read_run", "worst", "write_run"]

RUN_NAME = "run.json"
RUN_SCHEMA = 1


class Verdict(StrEnum):
    """What gates say, from best to worst."""

    ACCEPT = "ACCEPT"
    """Every gate holds."""
    REGRESSION = "REGRESSION"
    """A measured figure is on the wrong side of its threshold."""
    ANOMALOUS = "ANOMALOUS"
    """A figure is missing or not finite, or two things that must be equal are not: nothing measured can be trusted."""
    INFEASIBLE = "INFEASIBLE"
    """The stage cannot run here: a package, a device, memory or disk is missing, or the export is refused."""


class GateOutcome(FrozenConfig):
    """One gate of a recipe, judged."""

    name: str = Field(description="what it asks, in a few words")
    source: str = Field(description="where the figure stands: file of the run's directory, '#', path inside of it")
    value: float | None = Field(description="the figure; none where it is missing")
    at_least: float | None = Field(default=None, description="the smallest value accepted")
    at_most: float | None = Field(default=None, description="the largest value accepted")
    verdict: Verdict = Field(description="of this gate")
    reason: str = Field(description="why this threshold")


class StageRecord(FrozenConfig):
    """One stage, finished or failed."""

    name: str = Field(description="the stage's name in the recipe")
    command: str = Field(description="what it does: finetune, quantize-vit, export, validate, bench or serve-check")
    key: str = Field(description="sha256 over command, resolved configuration, contents of the inputs, and the version")
    inputs: dict[str, str] = Field(default_factory=dict, description="names of the stages it reads, by setting")
    output: str = Field(description="directory or file that it wrote, relative to the run's directory")
    content: str = Field(default="", description="content digest of the output; empty where it failed")
    files: dict[str, tuple[int, int]] = Field(
        default_factory=dict, description="size (bytes) and time of change (ns) of every file when the stage ended"
    )
    log: str = Field(default="", description="its log, relative to the run's directory")
    reproduce: str = Field(default="", description="the command that does the same by hand")
    started: str = Field(default="", description="UTC time, ISO 8601")
    seconds: float = Field(default=0.0, ge=0, description="wall time")
    peak_rss_bytes: int = Field(default=0, ge=0, description="largest resident memory of its processes, bytes")
    gates: list[GateOutcome] = Field(default_factory=list, description="the recipe's gates on this stage")
    verdict: Verdict = Field(description="the worst of its gates, or why it failed")
    error: dict[str, Any] | None = Field(default=None, description="the failure as `--json` gives it; none if it ended")


class RunRecord(FrozenConfig):
    """One run of a recipe."""

    schema_version: int = Field(default=RUN_SCHEMA, description="version of this schema")
    recipe: str = Field(description="the recipe's name")
    resolved: dict[str, Any] = Field(description="the recipe with every override and default applied")
    tool_version: str = Field(description="fp8pipe's version")
    versions: dict[str, str] = Field(default_factory=dict, description="versions of libraries that matter")
    machine: dict[str, Any] = Field(default_factory=dict, description="processor, cores, memory, GPUs")
    started: str = Field(description="UTC time of the last run that did something, ISO 8601")
    stages: list[StageRecord] = Field(default_factory=list, description="in order of the recipe")

    @property
    def verdict(self) -> Verdict:
        """The worst of the stages'."""
        return worst(stage.verdict for stage in self.stages)

    def stage(self, name: str) -> StageRecord | None:
        """The stage of that name, if it has run."""
        return next((stage for stage in self.stages if stage.name == name), None)


def worst(verdicts: Any) -> Verdict:
    """The worst of some verdicts; ACCEPT of none."""
    order = list(Verdict)
    return max(verdicts, key=order.index, default=Verdict.ACCEPT)


def read_run(directory: Path) -> RunRecord:
    """Read `directory`/run.json.

    Raises:
        BadArtifactError: there is none, or its seal is missing or another, or it is none of this schema.
    """
    path = Path(directory) / RUN_NAME
    try:
        return RunRecord.model_validate(json.loads(read_sealed(path)))
    except OSError as error:
        raise BadArtifactError(
            f"{directory} holds no run",
            why=f"it has no {RUN_NAME}",
            fix="give the directory that `fp8pipe run` wrote",
        ) from error
    except (ValueError, ValidationError) as error:
        raise BadArtifactError(
            f"{path} is no record of a run",
            why=" ".join(str(error).split())[:300],
            fix="run the recipe again",
        ) from error


def write_run(record: RunRecord, directory: Path) -> Path:
    """Write the record with its seal: a reader, and a run after a crash, sees the old one or the new one, whole."""
    return write_sealed(Path(directory) / RUN_NAME, record.model_dump_json(indent=2) + "\n")
