"""`fp8pipe run --dry-run`: which stages would run, why, and what each would take."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fp8pipe.cli.common import Console, table

if TYPE_CHECKING:
    from pipeline.chain import Chain, RunState, StageStatus

_WITHOUT_PLAN = ("validate",)


def show_plan(state: RunState, chain: Chain, console: Console) -> None:
    """Check every stage that would run, and show the plan; writes nothing."""
    statuses = state.statuses()
    chain.check([status.spec for status in statuses if status.run])
    stages = [_planned(state, status) for status in statuses]
    document = {"dry_run": True, "recipe": state.recipe.name, "directory": str(state.directory), "stages": stages}
    rows = [
        ("run" if stage["run"] else "skip", stage["name"], stage["command"], stage["why"], stage["output"])
        for stage in stages
    ]
    lines = [f"{state.recipe.name} in {state.directory} (plan; nothing was written)", table(rows)]
    for stage in stages:
        if stage["plan_text"]:
            lines += [f"{stage['name']}:", *(f"  {line}" for line in stage["plan_text"].splitlines())]
    console.emit(document, "\n".join(lines), quiet_text=" ".join(stage["name"] for stage in stages if stage["run"]))


def _planned(state: RunState, status: StageStatus) -> dict[str, Any]:
    spec = status.spec
    plan, text = _own_plan(state, status) if status.run else ({}, "")
    return {
        "name": spec.name, "command": spec.command, "run": status.run, "why": status.why,
        "reads": dict(spec.reads), "output": str(state.outputs[spec.name]), "plan": plan, "plan_text": text,
    }  # fmt: skip


def _own_plan(state: RunState, status: StageStatus) -> tuple[dict[str, Any], str]:
    """The command's own dry run, where all it reads is there."""
    spec = status.spec
    if spec.command in _WITHOUT_PLAN or any(not state.outputs[name].exists() for name in spec.reads.values()):
        return {}, ""
    with tempfile.TemporaryDirectory(prefix="fp8pipe-plan-") as folder:
        file = Path(folder) / f"{spec.name}.yaml"
        command = state.commands[spec.command]
        settings = state.settings(spec)
        filed = {key: value for key, value in settings.items() if key not in command.inline}
        file.write_text(yaml.safe_dump(filed), encoding="utf-8")
        line = [sys.executable, "-P", "-m", "fp8pipe"]
        line += [*command.arguments(settings, state.outputs[spec.name], file), "--dry-run", "--json"]
        ended = subprocess.run(line, capture_output=True, text=True)
    try:
        document = json.loads(ended.stdout)
    except ValueError:
        document = {"error": {"what": ended.stderr.strip()[-300:]}}
    return document, _text(document)


def _text(document: Mapping[str, Any]) -> str:
    if "error" in document:
        error = document["error"]
        return "\n".join(filter(None, (f"refused: {error.get('what')}", error.get("why"), error.get("fix"))))
    plan = document.get("plan", document)
    return "\n".join(f"{key}: {value}" for key, value in plan.items() if isinstance(value, str | int | float))
