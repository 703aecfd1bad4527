"""The state of a run: its recipe, its directory and the outputs in it, from which follows which stages must run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from fp8pipe.artifact import MANIFEST_NAME, installed_versions, open_artifact
from fp8pipe.artifact.manifest import canonical_digest
from fp8pipe.artifact.runs import RUN_NAME, RunRecord, StageRecord, read_run
from fp8pipe.artifact.verdict import read_verdict
from fp8pipe.artifact.writer import partial_of
from fp8pipe.core.errors import BadArtifactError, ConfigurationError
from fp8pipe.core.version import __version__
from pipeline.workflow.keys import VERSIONS, SourceDigests, file_states, stage_key
from pipeline.workflow.recipe import Recipe, StageSpec, references, settings_differing, substitute

__all__ = ["STAGES", "RunOptions", "RunState", "StageCommand", "StageStatus", "content_of"]

STAGES: Final = "stages"
Settings = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class StageCommand:
    """A command that stages can run, described by functions of the stage's settings.

    Attributes:
        name: name of the command on the command line.
        sources: settings that may name models, data and artifacts from outside the run.
        check: validates the settings; raises a ConfigurationError that lists every mistake. Called with the settings
            and, for each setting that references a stage, the command of that stage.
        arguments: returns the command line after `fp8pipe`. Called with the settings (references replaced by paths),
            the path of the output, and the path of the settings file.
        output: returns the path of the output. Called with the settings, the run's directory and the stage's name.
        inline: settings that `arguments` puts on the command line; the others are in the settings file.
        resumable: whether the command accepts --resume.
        program: the program that gets the command line; by default fp8pipe itself.
        environment: returns default environment variables, which those set by the user override. Called with the
            settings.
        versions: returns the versions of engines outside this Python environment. Called with the settings.
        device: returns the device that the command would use now, on which its output may depend. Called with the
            settings; None for commands without a `device` setting.
        parallel: whether torchrun may start the command as several processes, one per GPU.
        check_processes: raises a ConfigurationError if the settings leave nothing to do for some of several processes.
            Called with the settings and the number of processes, after `check`.
        without_effect: settings that change nothing in the output, and so are no part of the key.
    """

    name: str
    sources: tuple[str, ...]
    check: Callable[[Settings, Mapping[str, str]], None]
    arguments: Callable[[Settings, Path, Path], list[str]]
    output: Callable[[Settings, Path, str], Path]
    inline: tuple[str, ...] = ()
    resumable: bool = False
    program: tuple[str, ...] = (sys.executable, "-P", "-m", "fp8pipe")
    environment: Callable[[Settings], Mapping[str, str]] = lambda settings: {}
    versions: Callable[[Settings], Mapping[str, str]] = lambda settings: {}
    device: Callable[[Settings], str] | None = None
    parallel: bool = False
    without_effect: tuple[str, ...] = ()
    check_processes: Callable[[Settings, int], None] = lambda settings, count: None


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Options that determine which stages of a recipe are run."""

    first: str | None = None  # outputs of the stages before it are reused, even if their settings have changed
    last: str | None = None  # run only this stage and the stages it depends on
    force: tuple[str, ...] = ()  # stages to run even if nothing has changed
    jobs: int = 1  # maximum number of stages that run in parallel
    only: str | None = None  # run only this stage, on the present outputs of the others; it may be one of several jobs


@dataclass(frozen=True, slots=True)
class StageStatus:
    """Whether a stage must run, and why."""

    spec: StageSpec
    run: bool  # whether the stage must run
    why: str  # the reason, for the user
    key: str  # the stage's cache key; empty if it depends on a stage that has not run yet
    adopt: bool = False  # the output is complete, and only the record is missing


class RunState:
    """A recipe, the available commands, and the directory of the run, which need not exist.

    Raises:
        ConfigurationError: an unknown command or stage, two stages with the same output, or a directory that holds
            something other than a run.
    """

    def __init__(self, recipe: Recipe, commands: Mapping[str, StageCommand], directory: Path, options: RunOptions):
        self.recipe, self.commands, self.options = recipe, commands, options
        self.directory = Path(directory)
        unknown = [f"{spec.name}: {spec.command}" for spec in recipe.stages if spec.command not in commands]
        if unknown:
            raise ConfigurationError(
                f"the recipe {recipe.name} names unknown commands: {', '.join(unknown)}",
                why=f"stages can be: {', '.join(commands)}", fix="correct `command:`",
            )  # fmt: skip
        for name in (options.first, options.last, options.only, *options.force):
            if name is not None:
                recipe.stage(name)
        self.outputs = self._outputs()
        self.sources = SourceDigests(self.directory / STAGES / "sources.json")
        self.versions = installed_versions(VERSIONS)
        self._former = self._previous()
        self.records: dict[str, StageRecord] = {}
        self.started = ""  # of the last run that did something
        self.reread()

    def reread(self) -> None:
        """Take the records of all stages from the directory, as other processes may have written some."""
        written = self._previous()
        self.records = {stage.name: stage for stage in written.stages} if written else {}
        self.started = written.started if written else ""

    def settings(self, spec: StageSpec) -> dict[str, Any]:
        """A stage's settings, with references to other stages replaced by the paths of their outputs."""
        return substitute(spec.settings, self.outputs)

    def filed_settings(self, spec: StageSpec) -> dict[str, Any]:
        """Those settings of a stage that its command reads from the settings file, not from the command line."""
        inline = self.commands[spec.command].inline
        return {key: value for key, value in self.settings(spec).items() if key not in inline}

    def settings_file(self, spec: StageSpec) -> Path:
        """The file in which a stage's settings are passed to its command."""
        return self.directory / STAGES / f"{spec.name}.yaml"

    def marker(self, spec: StageSpec) -> Path:
        """The file with the cache key of the stage's last start; deleted once the stage is recorded without error."""
        return self.directory / STAGES / f"{spec.name}.key"

    def started_with(self, spec: StageSpec, key: str) -> bool:
        """Whether the stage was last started with this key and has not been recorded since."""
        return self.marker(spec).is_file() and self.marker(spec).read_text(encoding="utf-8") == key

    def partial(self, spec: StageSpec) -> Path:
        """The directory in which the stage's command writes an artifact before it is finished."""
        return partial_of(self.outputs[spec.name])

    def arguments(self, spec: StageSpec) -> list[str]:
        """The command line of a stage after `fp8pipe`."""
        command = self.commands[spec.command]
        return command.arguments(self.settings(spec), self.outputs[spec.name], self.settings_file(spec))

    def processes(self, spec: StageSpec) -> int:
        """The number of processes that a stage's command runs in."""
        return (spec.resources.gpus or 1) if self.commands[spec.command].parallel else 1

    def wanted(self) -> tuple[StageSpec, ...]:
        """The requested stages, and those they depend on, in order."""
        last = self.options.only or self.options.last
        if last is None:
            return self.recipe.stages
        needed = {last}
        for spec in reversed(self.recipe.stages):
            if spec.name in needed:
                needed.update(spec.needs)
        return tuple(spec for spec in self.recipe.stages if spec.name in needed)

    def statuses(self) -> list[StageStatus]:
        """The status of every requested stage, in order: whether it would run now, and why."""
        found: list[StageStatus] = []
        pending: set[str] = set()
        for spec in self.wanted():
            waiting = dict.fromkeys(name for name in spec.reads.values() if name in pending)
            why = f"after {' and '.join(waiting)}"
            found.append(StageStatus(spec, True, why, "") if waiting else self.status(spec))
            if found[-1].run:
                pending.add(spec.name)
        return found

    def status(self, spec: StageSpec) -> StageStatus:
        """Whether a stage must run now; all stages whose output it reads must have finished.

        Raises:
            ConfigurationError: its output is to be reused (`--from`, `--only`), but it is missing or was changed.
        """
        record = self.records.get(spec.name)
        if spec.name in self._taken_as_is():
            if record is None or record.error is not None or not self._intact(record):
                option = f"--only {self.options.only}" if self.options.only else f"--from {self.options.first}"
                raise ConfigurationError(
                    f"the stage {spec.name} has no output that can be reused",
                    why=f"{option} reuses its output, but that is unfinished or was changed",
                    fix=f"run {spec.name} first" if self.options.only else f"--from {spec.name}, or no --from",
                )
            return StageStatus(spec, False, "taken as it is", record.key)
        key = self.key(spec)
        if spec.name in self.options.force:
            return StageStatus(spec, True, "--force", key)
        why = self._stale(spec, record, key)
        if why and self._left_unrecorded(spec, key):
            return StageStatus(spec, False, "up to date, its record was lost", key, adopt=True)
        return StageStatus(spec, bool(why), why or "up to date", key)

    def key(self, spec: StageSpec) -> str:
        """The stage's cache key, computed from the current state of its inputs."""
        contents = {
            dotted: self.records[name].content if name in self.records else "" for dotted, name in spec.reads.items()
        }
        sources = {
            name: self._digest(spec.settings[name])
            for name in self.commands[spec.command].sources
            if spec.settings.get(name) is not None and name not in spec.reads
        }
        own = {name: version for name, version in self.versions.items() if name != "python"}
        engine = {f"engine {name}": v for name, v in self.commands[spec.command].versions(spec.settings).items()}
        return stage_key(self._placed(spec), contents, sources, own | engine)

    def _digest(self, value: Any) -> str:
        """The digest of the inputs that a setting names: one, or several in a list."""
        if isinstance(value, list | tuple):
            return canonical_digest([self._digest(one) for one in value if not references({"": one})])
        return self.sources.digest(str(value))

    def _placed(self, spec: StageSpec) -> StageSpec:
        """The stage with its `device` setting replaced by the device that it would use now, or removed for the CPU.

        So `auto` gives the same key as the device to which it resolves, and the CPU the same key as no `device`.
        Settings without effect on the output are removed.
        """
        command = self.commands[spec.command]
        settings = {name: value for name, value in spec.settings.items() if name not in command.without_effect}
        spec, device = replace(spec, settings=settings), command.device
        if device is None:
            return spec
        found = device(spec.settings)
        others = {name: value for name, value in spec.settings.items() if name != "device"}
        return replace(spec, settings=others if found == "cpu" else {**others, "device": found})

    def _stale(self, spec: StageSpec, record: StageRecord | None, key: str) -> str:
        """The reason why a stage must run; an empty string if it is up to date."""
        if record is None:
            return "unfinished" if self.started_with(spec, key) and self.partial(spec).is_dir() else "not yet run"
        if record.error is not None:
            return "failed before"
        if record.key != key:
            return self._changed(spec)
        return "" if self._intact(record) else "its output was changed or removed"

    def _changed(self, spec: StageSpec) -> str:
        """A description of what has changed since the last run, as far as the record of that run shows it."""
        former = self._former.resolved.get("stages", {}).get(spec.name) if self._former else None
        differing = [] if former is None else settings_differing(former, spec.settings)
        if differing:
            return f"changed: {', '.join(differing)}"
        if self._former and self._former.tool_version != __version__:
            return f"fp8pipe was {self._former.tool_version}, and is {__version__}"
        was = self._former.versions if self._former else {}
        other = [name for name in VERSIONS if was.get(name) != self.versions.get(name)]
        if other:
            return f"{other[0]} was {was.get(other[0], 'absent')}, and is {self.versions.get(other[0], 'absent')}"
        return "settings, inputs, the device or the engine's versions have changed"

    def _intact(self, record: StageRecord) -> bool:
        """Whether a stage's output is unmodified since it was recorded.

        File sizes and modification times are compared first; only if they have changed, hashes are.
        """
        output = self.outputs[record.name]
        try:
            if output.is_file():  # a verdict record, which is small, so it is always read
                return content_of(output, record.key) == record.content
            if file_states(output) == {name: tuple(state) for name, state in record.files.items()}:
                return output.is_dir()
            return open_artifact(output).content == record.content
        except BadArtifactError:
            return False

    def _left_unrecorded(self, spec: StageSpec, key: str) -> bool:
        """Whether the stage completed with this key in a run that died before it recorded the stage.

        Then the output is valid, and newer than the start of the stage.
        """
        marker, manifest = self.marker(spec), self.outputs[spec.name] / MANIFEST_NAME
        if not (manifest.is_file() and self.started_with(spec, key)):
            return False
        if manifest.stat().st_mtime_ns <= marker.stat().st_mtime_ns:
            return False
        try:
            open_artifact(self.outputs[spec.name])
        except BadArtifactError:
            return False
        return True

    def _outputs(self) -> dict[str, Path]:
        outputs: dict[str, Path] = {}
        for spec in self.recipe.stages:  # in order, so that the outputs a stage reads are known
            command = self.commands[spec.command]
            outputs[spec.name] = command.output(substitute(spec.settings, outputs), self.directory, spec.name)
        doubles = [name for name, path in outputs.items() if list(outputs.values()).count(path) > 1]
        if doubles:
            raise ConfigurationError(
                f"the stages {' and '.join(doubles)} would write the same file", why=str(outputs[doubles[0]]),
                fix="validate an export in one stage only",
            )  # fmt: skip
        return outputs

    def _previous(self) -> RunRecord | None:
        if (self.directory / RUN_NAME).is_file():
            return read_run(self.directory)
        foreign = self.directory.is_file() or (self.directory.is_dir() and any(self.directory.iterdir()))
        if foreign and not (self.directory / STAGES).is_dir():
            raise ConfigurationError(
                f"{self.directory} is not a run", why=f"it is not empty, and has no {RUN_NAME}",
                fix="name another directory with --output",
            )  # fmt: skip
        return None

    def _taken_as_is(self) -> set[str]:
        names = [spec.name for spec in self.recipe.stages]
        if self.options.only is not None:
            return set(names) - {self.options.only}
        if self.options.first is None:
            return set()
        return set(names[: names.index(self.options.first)])


def content_of(output: Path, key: str) -> str:
    """The content digest of a stage's output.

    For a verdict record, whose bytes include timestamps, it is a digest of the stage's key and the verdict.

    Args:
        output: the directory of an artifact, or the file of a verdict record.
        key: the cache key of the stage.

    Raises:
        BadArtifactError: `output` is neither an artifact nor a valid record.
    """
    if output.is_dir():
        return open_artifact(output, verify=False).content
    return canonical_digest([key, read_verdict(output).verdict])
