"""Run a recipe: start its stages in order, resume interrupted ones, evaluate their gates, and record each stage."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import yaml

from fp8pipe.artifact import CHECKPOINT_PREFIX, MANIFEST_NAME
from fp8pipe.artifact.gate import Verdict, worst
from fp8pipe.artifact.record import remove_checked
from fp8pipe.artifact.runs import RunRecord, StageRecord, write_run
from fp8pipe.core.errors import (
    BadArtifactError,
    ConfigurationError,
    Fp8PipeError,
    InterruptedRunError,
    MissingCapabilityError,
)  # fmt: skip
from fp8pipe.core.machine import describe_machine
from fp8pipe.core.version import __version__
from pipeline.workflow.gates import inside, judge, said_by_gates, verdict_of_failure
from pipeline.workflow.keys import file_states
from pipeline.workflow.locks import locked_record, locked_run
from pipeline.workflow.process import Ended, StageProcess
from pipeline.workflow.recipe import StageSpec
from pipeline.workflow.resources import launcher
from pipeline.workflow.state import RunState, StageCommand, StageStatus, content_of

__all__ = ["RECIPE_NAME", "WorkflowRunner", "write_recipe"]

LOGS, RECIPE_NAME = "logs", "recipe.yaml"
_POLL_S: Final = 0.05
_INTERRUPT_S: Final = 60.0

Show = Callable[[str, str], None]


class WorkflowRunner:
    """Runs the stages of a recipe; `show` is called with a stage's name and a line of output for the user."""

    def __init__(self, state: RunState, show: Show) -> None:
        self.state, self._show = state, show
        self._running: dict[str, tuple[StageProcess, StageStatus, str]] = {}
        self._failed = False
        self._began = ""  # UTC time, if this run does something
        self._locks: tuple[int, ...] = ()

    def check(self, stages: Sequence[StageSpec]) -> None:
        """Validate the settings of these stages, with the checks of their commands.

        Raises:
            ConfigurationError: a single error that lists the mistakes of all stages.
        """
        found, recipe = [], self.state.recipe
        for spec in stages:
            read = {dotted: recipe.stage(name).command for dotted, name in spec.reads.items()}
            command, settings = self.state.commands[spec.command], self.state.settings(spec)
            try:
                command.check(settings, read)
                if (count := self.state.processes(spec)) > 1:
                    _check_several(command, settings, count)
            except Fp8PipeError as error:
                found.append(f"{spec.name}: {error.why or error.what}")
        if found:
            raise ConfigurationError(
                f"the recipe {recipe.name} cannot be run as it is", why="; ".join(found),
                fix="correct the settings named above; `fp8pipe schema` describes them all",
            )  # fmt: skip

    def require_gpus(self, stages: Sequence[StageSpec]) -> None:
        """Refuse a stage of several processes that would all share the CPU of this machine.

        Raises:
            MissingCapabilityError: there is one.
        """
        for spec in stages:
            device, count = self.state.commands[spec.command].device, self.state.processes(spec)
            if device is not None and count > 1 and device(self.state.settings(spec)) == "cpu":
                raise MissingCapabilityError(
                    f"the stage {spec.name} asks for {count} GPUs", why="this machine has none that it can use",
                    fix=f"run it where they are, or use one process: --set {spec.name}.resources.gpus=0",
                )  # fmt: skip

    def run(self) -> RunRecord:
        """Run the stages that are not up to date, evaluate all gates, and write the record after every stage.

        Returns:
            The record of the run, or, if only one stage was to run, of that one and those it depends on. Failed gates
            are reported by its verdict, not by an error.

        Raises:
            ConfigurationError: another run uses the directory, or a command rejects its settings (all are listed).
            MissingCapabilityError: a stage asks for several GPUs, and this machine has none.
            Fp8PipeError: a stage failed for a reason that no verdict covers; the record contains the error, too.
            InterruptedRunError: the user pressed Ctrl-C; running stages have been stopped and can be resumed.
        """
        only = self.state.options.only
        reads = () if only is None else tuple(dict.fromkeys(self.state.recipe.stage(only).reads.values()))
        with locked_run(
            self.state.directory, shared=only is not None, stage=only, reads=reads,
            tell=lambda line: self._show(only or "run", line),
        ) as self._locks:  # fmt: skip
            self.state.reread()  # while this run waited, another may have recorded stages
            specs = [status.spec for status in self.state.statuses() if status.run]
            self.check(specs)
            self.require_gpus(specs)
            self._began = _now() if specs else ""
            write_recipe(self.state)
            try:
                self._schedule()
            except KeyboardInterrupt as error:
                names = ", ".join(self._running) or "nothing"
                for process, _, _ in self._running.values():
                    process.interrupt(_INTERRUPT_S)
                raise InterruptedRunError(
                    "interrupted", why=f"while running {names}", fix="run the same command again to continue from there"
                ) from error
            finally:
                for process, _, _ in self._running.values():
                    process.close()
            return self._result()

    def _schedule(self) -> None:
        waiting = list(self.state.wanted())
        names, ended = {spec.name for spec in waiting}, set[str]()
        while self._running or (waiting and not self._failed):
            for spec in list(waiting):
                free = len(self._running) < self.state.options.jobs and not self._failed
                if not free or not ended.issuperset(names.intersection(spec.needs)):
                    continue
                waiting.remove(spec)
                if not self._begin(self.state.status(spec)):
                    ended.add(spec.name)
            for name, (process, status, started) in list(self._running.items()):
                if (result := process.poll()) is not None:
                    del self._running[name]
                    ended.add(name)
                    self._judge(status.spec, self._finished(status, result, started))
            time.sleep(_POLL_S if self._running else 0)

    def _begin(self, status: StageStatus) -> bool:
        """Start a stage, or only evaluate and record it if it is up to date; returns whether it was started."""
        name = status.spec.name
        if status.run:
            self._show(name, f"{status.spec.command}: {status.why}")
            self._running[name] = (self._start(status), status, _now())
            return True
        record = self._adopted(status) if status.adopt else self.state.records[name]
        self._judge(status.spec, record, status.why)
        return False

    def _start(self, status: StageStatus) -> StageProcess:
        """Start the process of a stage, which resumes an unfinished run with the same key if there is one."""
        state, spec = self.state, status.spec
        command, output, count = state.commands[spec.command], state.outputs[spec.name], state.processes(spec)
        _write_yaml(state.settings_file(spec), state.filed_settings(spec))
        extra = ["--resume"] if self._prepare(spec, command, status.key) else []
        if output.is_dir():
            extra.append("--force")
        elif output.is_file():
            remove_checked(output)  # so that an old verdict record is not taken for the new one
        log = state.directory / LOGS / f"{spec.name}.log"
        log.parent.mkdir(exist_ok=True)
        log.unlink(missing_ok=True)
        return StageProcess(
            [*launcher(command.program, count), *state.arguments(spec), *extra], log,
            {**command.environment(state.settings(spec)), **spec.resources.environment(count)},
            lambda line: self._show(spec.name, line), self._locks,
        )  # fmt: skip

    def _prepare(self, spec: StageSpec, command: StageCommand, key: str) -> bool:
        """Write the stage's key, and delete unfinished output of another key; returns whether some can be resumed."""
        marker, partial = self.state.marker(spec), self.state.partial(spec)
        if partial.is_dir() and not self.state.started_with(spec, key):
            shutil.rmtree(partial)
        marker.write_text(key, encoding="utf-8")
        return command.resumable and partial.is_dir() and any(partial.glob(f"{CHECKPOINT_PREFIX}*"))

    def _finished(self, status: StageStatus, result: Ended, started: str) -> StageRecord:
        spec, output = status.spec, self.state.outputs[status.spec.name]
        error = result.document.get("error") if result.code else None
        if result.code and error is None:
            what = f"the process of the stage {spec.name} died"
            # The launcher of several processes exits with 1 if one was killed, which must not look like an error of it.
            code = result.code if self.state.processes(spec) == 1 else 128 + signal.SIGKILL
            error = {"type": "Died", "exit_code": code, "what": what, "why": "", "fix": ""}
        # A verdict record, even REJECT, is output: old ones were removed. An old manifest may remain, so compare times.
        manifest, began = output / MANIFEST_NAME, self.state.marker(spec).stat().st_mtime_ns
        anew = manifest.is_file() and manifest.stat().st_mtime_ns >= began
        # The launcher of several processes exits with 1 whatever the exit code of the process that failed.
        if anew and said_by_gates(int(error["exit_code"]) if error else result.code, output):
            error = None  # the stage completed; its failed gates are evaluated below
        written = output.is_file() or (error is None and anew)
        return self._described(status, started, result.seconds, result.peak_rss_bytes, error, written)

    def _adopted(self, status: StageStatus) -> StageRecord:
        """The record of a stage that completed, but whose run was killed before it could record the stage."""
        marker = self.state.marker(status.spec).stat().st_mtime
        manifest = (self.state.outputs[status.spec.name] / MANIFEST_NAME).stat().st_mtime
        started = datetime.fromtimestamp(marker, UTC).isoformat(timespec="seconds")
        return self._described(status, started, max(0.0, manifest - marker), 0, None, True)

    def _described(
        self, status: StageStatus, started: str, seconds: float, peak: int, error: dict[str, Any] | None, written: bool
    ) -> StageRecord:
        spec, state = status.spec, self.state
        output = state.outputs[spec.name]
        if not written and error is None:
            what = f"the stage {spec.name} succeeded, but wrote nothing at {output}"
            error = {"type": "BadArtifactError", "exit_code": 12, "what": what, "why": "", "fix": "see its log"}
        return StageRecord(
            name=spec.name, command=spec.command, key=status.key, inputs=dict(spec.reads),
            output=inside(output, state.directory), content=_content(output, status.key) if written else "",
            files=file_states(output) if written else {}, log=f"{LOGS}/{spec.name}.log",
            reproduce=self._reproduce(spec), started=started, seconds=seconds,
            peak_rss_bytes=peak, verdict=Verdict.ACCEPT, error=error,
        )  # fmt: skip

    def _reproduce(self, spec: StageSpec) -> str:
        count = self.state.processes(spec)
        start = ["torchrun", "--nproc-per-node", str(count), "-m"] if count > 1 else []
        return shlex.join([*start, "fp8pipe", *self.state.arguments(spec)])

    def _judge(self, spec: StageSpec, record: StageRecord, note: str = "") -> None:
        """Evaluate a stage's gates and write the run's record; if the verdict is a failure, no more stages start."""
        state = self.state
        code = int(record.error["exit_code"]) if record.error else 0
        gates = judge(spec, state.directory, state.outputs) if record.files else []
        failure = verdict_of_failure(code) if code else None
        verdict = worst([*(gate.verdict for gate in gates), *([failure or Verdict.ANOMALOUS] if code else [])])
        judged = record.model_copy(update={"gates": gates, "verdict": verdict})
        with locked_record(state.directory):
            if state.options.only:
                state.reread()  # other jobs record their stages
            state.records[spec.name] = judged
            state.sources.save()
            write_run(self._record(), state.directory)
        if not code:
            state.marker(spec).unlink(missing_ok=True)
        self._show(spec.name, f"{verdict} {note or f'in {record.seconds:.0f} s'}")
        if code and failure is None:
            raise _stage_error(spec.name, record)
        self._failed |= verdict.failed

    def _result(self) -> RunRecord:
        record = self._record()
        if self.state.options.only is None:
            return record
        names = {spec.name for spec in self.state.wanted()}
        return record.model_copy(update={"stages": [stage for stage in record.stages if stage.name in names]})

    def _record(self) -> RunRecord:
        records = self.state.records
        return RunRecord(
            recipe=self.state.recipe.name, resolved=self.state.recipe.plain(), tool_version=__version__,
            versions=self.state.versions, machine=describe_machine(),
            started=self._began or self.state.started or _now(),
            stages=[records[spec.name] for spec in self.state.recipe.stages if spec.name in records],
        )  # fmt: skip


def _check_several(command: StageCommand, settings: Mapping[str, Any], count: int) -> None:
    """Check the settings of a stage that runs in `count` processes, one for each GPU."""
    if settings.get("device") == "cpu":
        raise ConfigurationError(
            f"{count} GPUs are of no use", why=f"device is cpu, and resources.gpus is {count}: each GPU gets a process"
        )
    command.check_processes(settings, count)


def _content(output: Path, key: str) -> str:
    """The content digest of a stage's output; empty if the output is damaged, for which `judge` adds a failed gate."""
    try:
        return content_of(output, key)
    except BadArtifactError:
        return ""


def _stage_error(name: str, record: StageRecord) -> Fp8PipeError:
    failure = record.error or {}
    error = Fp8PipeError(
        f"the stage {name} failed: {failure.get('what', '')}", why=str(failure.get("why", "")),
        fix=f"{failure.get('fix') or 'see its log'} (log: {record.log})",
    )  # fmt: skip
    error.exit_code = int(failure.get("exit_code", 1))  # type: ignore[misc]
    return error


def write_recipe(state: RunState) -> Path:
    """Write the recipe with all overrides applied into the directory of the run; returns the path of the file."""
    path = state.directory / RECIPE_NAME
    with locked_record(state.directory):
        _write_yaml(path, state.recipe.plain())
    return path


def _write_yaml(path: Path, values: dict[str, Any]) -> None:
    """Write a YAML file, which others may read at any moment."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
    os.replace(partial, path)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
