"""Runs recipes of quick stages (`workflow_stage.py`) in a directory, for tests of the workflow."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import workflow_stage  # registers the kind that stages write

from pipeline.workflow import RunOptions, RunState, StageCommand, WorkflowRunner
from pipeline.workflow.recipe import recipe_of

PROGRAM = (sys.executable, "-P", workflow_stage.__file__)
# The stage's script imports the project as an installed package, or from here.
ENGINE = {"vllm": "0.19.1"}
ROOT = str(Path(__file__).parents[2])


def quick_commands() -> dict[str, StageCommand]:
    """`work` writes an artifact, `record` a record beside what it reads."""

    def check(settings: Mapping[str, Any], read: Mapping[str, str]) -> None:
        from fp8pipe.core.errors import ConfigurationError

        known = (
            "value",
            "steps",
            "seconds",
            "reads",
            "source",
            "gate",
            "score",
            "exit_code",
            "killed",
            "verdict",
            "orphan",
            "waits_for",
            "writes",
        )
        unknown = [key for key in settings if key not in known]
        if unknown:
            raise ConfigurationError("unknown settings", why=f"{', '.join(unknown)}: unknown key")

    def arguments(name: str) -> Callable[[Mapping[str, Any], Path, Path], list[str]]:
        return lambda settings, output, file: [name, "--config", str(file), "--output", str(output)]

    environment = {"PYTHONPATH": ROOT}
    return {
        "work": StageCommand(
            "work", ("source",), check, arguments("work"), lambda s, d, n: d / n, resumable=True, program=PROGRAM,
            environment=lambda settings: environment, parallel=True,
        ),
        "record": StageCommand(
            "record", (), check, arguments("record"), lambda s, d, n: d / f"{Path(s['reads']).name}.record.json",
            program=PROGRAM, environment=lambda settings: environment, versions=lambda settings: ENGINE,
        ),
    }  # fmt: skip


class Runner:
    """Runs recipes given as data, and remembers which stages it started."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lines: list[tuple[str, str]] = []

    def state(self, stages: Mapping[str, Any], **options: Any) -> RunState:
        recipe = recipe_of({"name": "test", "stages": stages}, "test")
        return RunState(recipe, quick_commands(), self.directory, RunOptions(**options))

    def run(self, stages: Mapping[str, Any], **options: Any):
        self.lines = []
        return WorkflowRunner(self.state(stages, **options), lambda stage, line: self.lines.append((stage, line))).run()

    @property
    def started(self) -> list[str]:
        """Stages that ran in the last run, in order."""
        return [stage for stage, line in self.lines if line.startswith(("work: ", "record: "))]
