"""The record of a run of a recipe, with the inputs, output, duration and gates of each stage.

It is written atomically after every stage, to the directory of the run that also contains the outputs of the stages.
The record contains the digests of these outputs. It is read by `verify`, by `report` and by later runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from fp8pipe.artifact.gate import Comparison, Gate, Verdict, worst
from fp8pipe.artifact.record import read_checked, write_checked
from fp8pipe.core.config import FrozenConfig
from fp8pipe.core.errors import BadArtifactError, one_line

__all__ = ["RUN_NAME", "RunRecord", "StageRecord", "read_run", "write_run"]

RUN_NAME = "run.json"
# Schema 2 added the comparison of gates.
RUN_SCHEMA = 2


class StageRecord(FrozenConfig):
    """The result of one stage, whether it succeeded or failed."""

    name: str = Field(description="the stage's name in the recipe")
    command: str = Field(
        description="what it does: finetune, quantize-vit, export, validate, bench, serve-check or evaluate"
    )
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
    gates: list[Gate] = Field(default_factory=list, description="the recipe's gates on this stage")
    verdict: Verdict = Field(description="the worst of its gates, or why it failed")
    error: dict[str, Any] | None = Field(
        default=None, description="the failure as `--json` gives it; none if it succeeded"
    )


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
        """The worst verdict of all stages."""
        return worst(stage.verdict for stage in self.stages)

    def stage(self, name: str) -> StageRecord | None:
        """The record of the stage with this name, if it has run."""
        return next((stage for stage in self.stages if stage.name == name), None)


def read_run(directory: Path) -> RunRecord:
    """Read `directory`/run.json.

    Raises:
        BadArtifactError: there is no record, its checksum is missing or does not match, or it is invalid.
    """
    path = Path(directory) / RUN_NAME
    try:
        return RunRecord.model_validate(_migrated(json.loads(read_checked(path))))
    except OSError as error:
        raise BadArtifactError(
            f"{directory} holds no run", why=f"it has no {RUN_NAME}", fix="give the directory that `fp8pipe run` wrote"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise BadArtifactError(
            f"{path} is not a record of a run", why=one_line(error), fix="run the recipe again"
        ) from error


def _migrated(data: dict[str, Any]) -> dict[str, Any]:
    """Migrate a record to the current schema; in schema 1, gates had two bounds instead of comparison and threshold."""
    if data.get("schema_version", 1) >= RUN_SCHEMA:
        return data
    stages = [{**stage, "gates": [new for old in stage["gates"] for new in _two(old)]} for stage in data["stages"]]
    return data | {"stages": stages, "schema_version": RUN_SCHEMA}


def _two(old: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    bounds = {Comparison.AT_LEAST: old.get("at_least"), Comparison.AT_MOST: old.get("at_most")}
    kept = {"name": old["name"], "value": old["value"], "source": old["source"], "detail": old["reason"]}
    failure = old["verdict"] if old["verdict"] != Verdict.ACCEPT else Verdict.ANOMALOUS
    for comparison, threshold in bounds.items():
        if threshold is not None:
            yield {**kept, "comparison": comparison, "threshold": threshold, "failure": failure}


def write_run(record: RunRecord, directory: Path) -> Path:
    """Write the record of a run with its checksum, see `write_checked`; returns its path."""
    return write_checked(Path(directory) / RUN_NAME, record.model_dump_json(indent=2) + "\n")
