"""`fp8pipe run` runs a recipe from the base model to verified exports, resumes interrupted runs, and shows dry runs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fp8pipe.cli.common import PATH, Console, common_options, format_bytes, table

if TYPE_CHECKING:
    from fp8pipe.artifact.runs import RunRecord
    from pipeline.workflow import RunState, StageStatus, WorkflowRunner


@click.command("run")
@click.argument("recipe", type=click.Path(path_type=Path, dir_okay=False, readable=False))
@click.option("--output", type=PATH, help="Directory of the run.  [runs/NAME of the recipe]")
@click.option("--set", "overrides", multiple=True, metavar="STAGE.KEY=VALUE", help="Change a setting; repeatable.")
@click.option("--from", "first", metavar="STAGE", help="Take the stages before it as they are.")
@click.option("--until", "last", metavar="STAGE", help="Run it and what it needs, nothing else.")
@click.option("--force", multiple=True, metavar="STAGE", help="Run it even if nothing has changed; repeatable.")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Stages that run at the same time, at most.",
)
@click.option("--only", metavar="STAGE", help="Run it alone, on what the others have left; several may run at once.")
@click.option("--ray", metavar="ADDRESS", help="Ray cluster to run the stages on: auto, local, or ray://HOST:PORT.")
@click.option("--no-report", is_flag=True, help="Write no report at the end.")
@common_options(dry_run=True)
def run_command(
    recipe: Path, output: Path | None, overrides: tuple[str, ...], ray: str | None, no_report: bool, dry_run: bool,
    console: Console, **chosen: Any,
) -> None:  # fmt: skip
    """Run the stages of RECIPE that are not up to date, check the gates of all stages, and write a report.

    If a gate fails, the exit code is 14 and the verdict is REGRESSION, ANOMALOUS or INFEASIBLE. After an interruption,
    the same command continues the run.
    """
    from fp8pipe.cli.stages import stage_commands
    from pipeline.workflow import RunOptions, RunState, WorkflowRunner, load_recipe

    _check_options(ray, dry_run, chosen)
    read = load_recipe(recipe, overrides)
    state = RunState(read, stage_commands(), output or Path("runs") / read.name, RunOptions(**chosen))

    def show(stage: str, line: str) -> None:
        if not console.quiet:
            click.echo(f"[{stage}] {line}", err=True)

    runner = WorkflowRunner(state, show)
    if dry_run:
        _show_plan(state, runner, console)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    before = _work_done(state)
    if ray is not None:
        from pipeline.workflow.ray_run import RayRunner

        record = RayRunner(state, show, ray, quiet=console.quiet).run()
        state.reread()
    else:
        record = runner.run()
    report = state.directory / "report.html"
    no_report |= state.options.only is not None  # one of several jobs: the run is unfinished
    if not no_report and (_work_done(state) != before or not report.is_file()):
        _report(state.directory)
    _finish(record, state, report if report.is_file() else None, console)


def _check_options(ray: str | None, dry_run: bool, chosen: Mapping[str, Any]) -> None:
    """Refuse options that contradict each other."""
    others = [f"--{name}" for name, key in (("from", "first"), ("until", "last")) if chosen[key] is not None]
    others += ["--ray"] if ray is not None else []
    if chosen["only"] is not None and others:
        raise click.UsageError(f"--only runs one stage, here: it cannot be given with {' and '.join(others)}")
    if ray is not None and dry_run:
        raise click.UsageError("--dry-run plans for this machine, and not for a cluster: leave --ray out")


def _work_done(state: RunState) -> list[str]:
    """The records of the finished stages; a new report is needed if they change."""
    return [record.model_dump_json() for record in state.records.values()]


def _report(directory: Path) -> None:
    """Write the report as `fp8pipe report` does; a failure to write it only prints a warning."""
    ended = subprocess.run(
        [sys.executable, "-P", "-m", "fp8pipe", "report", str(directory), "--quiet"], capture_output=True, text=True
    )
    if ended.returncode:
        click.echo(f"warning: no report was written: {ended.stderr.strip().splitlines()[-1:]}", err=True)


def _finish(record: RunRecord, state: RunState, report: Path | None, console: Console) -> None:
    from fp8pipe.artifact.gate import Verdict
    from fp8pipe.core.errors import GateFailedError

    rows = [
        (stage.verdict, stage.name, stage.command, f"{stage.seconds:.0f} s", stage.output) for stage in record.stages
    ]
    lines = [f"{record.verdict}  {record.recipe} in {state.directory}", table(rows)]
    lines += [f"  report: {report}"] if report else []
    console.emit(
        {"verdict": record.verdict, "directory": str(state.directory),
         "report": str(report) if report else None, "run": record.model_dump(mode="json")},
        "\n".join(lines), quiet_text=str(record.verdict),
    )  # fmt: skip
    if record.verdict is not Verdict.ACCEPT and not record.verdict.failed:
        click.echo(f"not proved: {'; '.join(_reasons(record))}", err=True)
    if record.verdict.failed:
        raise GateFailedError(
            f"the verdict is {record.verdict}", why="; ".join(_reasons(record)),
            fix="see the report and the stages' logs; after a correction run the same command again",
        )  # fmt: skip


def _reasons(record: RunRecord) -> list[str]:
    """Every gate that failed, and every stage that failed."""
    from fp8pipe.artifact.gate import Verdict

    found = []
    for stage in record.stages:
        if stage.error is not None:
            found.append(f"{stage.name}: {stage.error.get('what', '')}")
        for gate in stage.gates:
            if gate.verdict is not Verdict.ACCEPT:
                found.append(f"{stage.name}: {gate.name} is {gate.numbers}")
    return found


def _show_plan(state: RunState, runner: WorkflowRunner, console: Console) -> None:
    """Check every stage that would run, and show the plan; writes nothing. Exits as the first refused stage does."""
    statuses = state.statuses()
    specs = [status.spec for status in statuses if status.run]
    runner.check(specs)
    runner.require_gpus(specs)
    anew = {status.spec.name for status in statuses if status.run}
    stages = [_planned(state, status, anew.intersection(status.spec.reads.values())) for status in statuses]
    total = _total(stages, state.directory)
    document = {
        "dry_run": True, "recipe": state.recipe.name, "directory": str(state.directory), "stages": stages,
        "total": total,
    }  # fmt: skip
    rows = [
        ("run" if stage["run"] else "skip", stage["name"], stage["command"], stage["why"], stage["output"])
        for stage in stages
    ]
    lines = [f"{state.recipe.name} in {state.directory} (plan; nothing was written)", table(rows)]
    for stage in stages:
        if stage["plan_text"]:
            lines += [f"{stage['name']}:", *(f"  {line}" for line in stage["plan_text"].splitlines())]
    lines += ["in all:", *(f"  {line}" for line in _total_lines(total))]
    console.emit(document, "\n".join(lines), quiet_text=" ".join(stage["name"] for stage in stages if stage["run"]))
    if refused := next((stage["exit_code"] for stage in stages if stage["exit_code"]), 0):
        raise click.exceptions.Exit(refused)


def _planned(state: RunState, status: StageStatus, old: set[str]) -> dict[str, Any]:
    """A stage's plan as JSON data.

    Stages in `old` will run again before this one; until then, the plan is based on their current outputs.
    """
    spec = status.spec
    plan, text, code = _own_plan(state, status) if status.run else ({}, "", 0)
    if text and old:
        text = f"by what {' and '.join(sorted(old))} holds now\n{text}"
    return {
        "name": spec.name, "command": spec.command, "run": status.run, "why": status.why,
        "reads": dict(spec.reads), "output": str(state.outputs[spec.name]), "plan": plan, "plan_text": text,
        "exit_code": code,
    }  # fmt: skip


def _own_plan(state: RunState, status: StageStatus) -> tuple[dict[str, Any], str, int]:
    """The JSON document, text and exit code of the command's own dry run; both empty if an input does not exist yet."""
    import yaml

    spec = status.spec
    if any(not state.outputs[name].exists() for name in spec.reads.values()):
        return {}, "", 0
    with tempfile.TemporaryDirectory(prefix="fp8pipe-plan-") as folder:
        file = Path(folder) / f"{spec.name}.yaml"
        command = state.commands[spec.command]
        settings = state.settings(spec)
        file.write_text(yaml.safe_dump(state.filed_settings(spec)), encoding="utf-8")
        line = [sys.executable, "-P", "-m", "fp8pipe"]
        line += [*command.arguments(settings, state.outputs[spec.name], file), "--dry-run", "--json"]
        if state.outputs[spec.name].is_dir():
            line.append("--force")  # because the run itself replaces the output
        ended = subprocess.run(line, capture_output=True, text=True)
    try:
        document = json.loads(ended.stdout)
    except ValueError:
        document = {"error": {"what": ended.stderr.strip()[-300:]}}
    return document, _text(document), ended.returncode


def _text(document: Mapping[str, Any]) -> str:
    if "error" in document:
        error = document["error"]
        return "\n".join(filter(None, (f"refused: {error.get('what')}", error.get("why"), error.get("fix"))))
    if "plan" not in document:
        return ""
    from fp8pipe.core.plan import Plan

    return Plan.of_document(document["plan"]).text()


def _total(stages: Sequence[Mapping[str, Any]], directory: Path) -> dict[str, Any]:
    """Totals over the stages that would run, as far as their plans are known now.

    Stages run one after the other: peak memory is the maximum over stages, outputs accumulate, and of the additional
    disk space that stages need while running (checkpoints), the largest counts once.
    """
    from fp8pipe.core.machine import free_bytes

    running = [stage for stage in stages if stage["run"]]
    plans = {stage["name"]: stage["plan"]["plan"] for stage in running if "plan" in stage["plan"]}
    beyond = [plan["disk_bytes"] - plan["output_bytes"] for plan in plans.values()]
    disk = sum(plan["output_bytes"] for plan in plans.values()) + max(beyond, default=0)
    missing = [item for plan in plans.values() for item in plan["missing"]]
    return {
        "peak_memory_bytes": max((plan["peak_memory_bytes"] or 0 for plan in plans.values()), default=0),
        "disk_bytes": disk,
        "seconds": sum(plan["seconds"] or 0.0 for plan in plans.values()),
        "missing": [item for index, item in enumerate(missing) if item not in missing[:index]],
        "fits_disk": disk <= free_bytes(directory),
        "without_time": [name for name, plan in plans.items() if plan["seconds"] is None],
        "not_planned": [stage["name"] for stage in running if stage["name"] not in plans],
    }


def _total_lines(total: Mapping[str, Any]) -> list[str]:
    if not total["peak_memory_bytes"] and not total["not_planned"]:
        return ["nothing would run"]
    lines = [
        f"memory  {format_bytes(total['peak_memory_bytes'])} at the largest stage's peak",
        f"disk    {format_bytes(total['disk_bytes'])}{'' if total['fits_disk'] else ': NOT ENOUGH IS FREE'}",
        f"time    about {total['seconds']:.0f} s",
    ]
    if total["without_time"]:
        lines[-1] += f", and {', '.join(total['without_time'])}, whose time is not estimated"
    lines += [f"MISSING {item['what']}; {item['fix']}" for item in total["missing"]]
    if total["not_planned"]:
        names = ", ".join(total["not_planned"])
        lines.append(f"not in these figures: {names}; their inputs do not exist yet, or their plan failed")
    return lines
