"""`fp8pipe run`: a recipe from base model to proven exports, resumed wherever it was cut."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fp8pipe.cli.common import Console, common_options, table

if TYPE_CHECKING:
    from fp8pipe.artifact.runs import RunRecord
    from pipeline.workflow import RunState


@click.command("run")
@click.argument("recipe", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--output", type=click.Path(path_type=Path), help="Directory of the run.  [runs/NAME of the recipe]")
@click.option("--set", "overrides", multiple=True, metavar="STAGE.KEY=VALUE", help="Change a setting; repeatable.")
@click.option("--from", "first", metavar="STAGE", help="Take the stages before it as they are.")
@click.option("--until", "last", metavar="STAGE", help="Run it and what it needs, nothing else.")
@click.option("--force", multiple=True, metavar="STAGE", help="Run it even if nothing has changed; repeatable.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Stages side by side, at most.")
@click.option("--no-report", is_flag=True, help="Write no report at the end.")
@common_options(dry_run=True)
def command(
    recipe: Path,
    output: Path | None,
    overrides: tuple[str, ...],
    first: str | None,
    last: str | None,
    force: tuple[str, ...],
    jobs: int,
    no_report: bool,
    dry_run: bool,
    console: Console,
) -> None:
    """Run the stages of RECIPE that are not up to date, judge all of them, and write a report.

    Exit 14 where a gate did not hold, with the verdict: REGRESSION, ANOMALOUS or INFEASIBLE. Interrupted or killed, the
    same command goes on from where it was.
    """
    from fp8pipe.cli.stages import stage_commands
    from pipeline.workflow import RunOptions, RunState, WorkflowRunner, load_recipe

    read = load_recipe(recipe, overrides)
    options = RunOptions(first=first, last=last, force=force, jobs=jobs)
    state = RunState(read, stage_commands(), output or Path("runs") / read.name, options)
    if dry_run:
        from fp8pipe.cli.run_plan import show_plan

        show_plan(state, WorkflowRunner(state, _silent), console)
        return
    signal.signal(signal.SIGTERM, _interrupted)
    before = _work_done(state)
    record = WorkflowRunner(state, _shown(console)).run()
    if not no_report and (_work_done(state) != before or not (state.directory / REPORT).is_file()):
        _report(state.directory, console)
    _finish(record, state, console)


REPORT = "report.html"


def _work_done(state: RunState) -> list[str]:
    """What a report would show anew."""
    return [record.model_dump_json() for record in state.records.values()]


def _silent(stage: str, line: str) -> None:
    """Nobody listens."""


def _shown(console: Console) -> Any:
    def show(stage: str, line: str) -> None:
        if not console.quiet:
            click.echo(f"[{stage}] {line}", err=True)

    return show


def _interrupted(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _report(directory: Path, console: Console) -> None:
    """The report, as `fp8pipe report` writes it; that it cannot be written is said, and is no verdict on the model."""
    import subprocess
    import sys

    ended = subprocess.run(
        [sys.executable, "-P", "-m", "fp8pipe", "report", str(directory), "--quiet"], capture_output=True, text=True
    )
    if ended.returncode:
        click.echo(f"warning: no report was written: {ended.stderr.strip().splitlines()[-1:]}", err=True)


def _finish(record: RunRecord, state: RunState, console: Console) -> None:
    from fp8pipe.artifact.runs import Verdict
    from fp8pipe.core.errors import GateFailedError

    rows = [
        (stage.verdict, stage.name, stage.command, f"{stage.seconds:.0f} s", stage.output) for stage in record.stages
    ]
    lines = [f"{record.verdict}  {record.recipe} in {state.directory}", table(rows)]
    report = state.directory / REPORT
    if report.is_file():
        lines.append(f"  report: {report}")
    console.emit(
        {"verdict": record.verdict, "directory": str(state.directory),
         "report": str(report) if report.is_file() else None, "run": record.model_dump(mode="json")},
        "\n".join(lines), quiet_text=str(record.verdict),
    )  # fmt: skip
    if record.verdict is not Verdict.ACCEPT:
        raise GateFailedError(
            f"the verdict is {record.verdict}", why="; ".join(_reasons(record)),
            fix="see the report and the stages' logs; after a correction run the same command again",
        )  # fmt: skip


def _reasons(record: RunRecord) -> list[str]:
    """Each gate that does not hold, each stage that failed."""
    from fp8pipe.artifact.runs import Verdict

    found = []
    for stage in record.stages:
        if stage.error is not None:
            found.append(f"{stage.name}: {stage.error.get('what', '')}")
        for gate in stage.gates:
            if gate.verdict is not Verdict.ACCEPT:
                found.append(f"{stage.name}: {gate.name} is {gate.numbers}")
    return found
