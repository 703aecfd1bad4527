"""Code shared by all commands: common options, the JSON document on stdout, and exit codes for failures."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json as jsonlib
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from fp8pipe.core.devices import DEVICE_HELP, DEVICES
from fp8pipe.core.errors import ConfigurationError, Fp8PipeError, GateFailedError, OutOfMemoryError, first_line
from fp8pipe.core.machine import format_bytes, is_disk_full
from fp8pipe.core.progress import table

if TYPE_CHECKING:
    from fp8pipe.artifact import Artifact
    from fp8pipe.core.plan import Plan

__all__ = [
    "PATH", "Console", "Failure", "common_options", "failure_of", "format_bytes", "next_step", "require_gates",
    "show_artifact", "show_plan", "stacked", "stage_options", "table",
]  # fmt: skip


# System errors caused by an unusable path. A missing file is not among them: that may be our own bug.
_UNUSABLE = frozenset(
    (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS)
)
# click would report an unreadable path as a usage error; here it is treated like any other unusable input.
PATH = click.Path(path_type=Path, readable=False)
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


@dataclass
class Console:
    """Prints a command's result: as text when it is reported, or as one JSON document when the command ends."""

    json: bool = False  # print a single JSON document on stdout at the end
    quiet: bool = False  # print the shortest text (an artifact's path)
    verbose: bool = False  # print more on stderr
    document: dict[str, Any] = field(default_factory=dict)
    _outside: tuple[TextIO, int | None] | None = None  # stdout, and a copy of its descriptor, while it is captured

    def emit(self, document: Mapping[str, Any], text: str, *, quiet_text: str = "") -> None:
        """Report the command's result.

        Args:
            document: for `--json`; printed when the command ends. If the command fails after `emit`, `error` is added,
                so that there is always exactly one document; a later `emit` adds its keys.
            text: for people, printed on stdout immediately.
            quiet_text: printed instead with `--quiet`; if empty, nothing is printed.
        """
        self.document.update(document)
        if self.json:
            return
        shown = quiet_text if self.quiet else text
        if shown:
            click.echo(shown)

    def finish(self, failure: Failure | None = None) -> None:
        """Print the document, including the failure if there was one; called once, by the group."""
        if not self.json:
            return
        document = dict(self.document)
        if failure is not None:
            document["error"] = failure.document
        if document:
            # ASCII, so that it can be printed in any locale.
            click.echo(jsonlib.dumps(_plain(document), indent=2, allow_nan=False))

    def abort(self, error: BaseException) -> None:
        """Print an error that ends the process at once, from another thread than that of the command."""
        failure = failure_of(error)
        click.echo(failure.text, err=True)
        if self._outside is not None:
            sys.stdout, descriptor = self._outside
            if descriptor is not None:
                os.dup2(descriptor, 1)
        self.finish(failure)

    @contextlib.contextmanager
    def capture_stdout(self) -> Iterator[None]:
        """With `--json`, redirect everything printed on stdout to stderr: by libraries, child processes and C code."""
        if not self.json:
            yield
            return
        before, saved = self._outside, _divert_descriptor()
        self._outside = before or (sys.stdout, saved)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        finally:
            self._outside = before
            if saved is not None:
                sys.stdout.flush()
                os.dup2(saved, 1)
                os.close(saved)


@dataclass(frozen=True, slots=True)
class Failure:
    """A failure in the form that the command line reports."""

    exit_code: int
    text: str
    document: dict[str, Any]


def failure_of(error: BaseException) -> Failure:
    """The message and exit code for `error`; unexpected errors keep their traceback and exit with code 1."""
    if isinstance(error, click.ClickException):
        return _failure(type(error).__name__, error.exit_code, error.format_message())
    if isinstance(error, KeyboardInterrupt):
        return _failure("Interrupted", 130, "interrupted", fix="run it again, with --resume if it has it")
    if isinstance(error, OSError | MemoryError | RuntimeError):
        error = _as_out_of_memory(error) or _as_unusable_path(error) or error
    if isinstance(error, Fp8PipeError):
        findings = getattr(error, "findings", ())
        return _failure(type(error).__name__, error.exit_code, error.what, error.why, error.fix, findings=findings)
    trace = "".join(traceback.format_exception(error))
    failure = _failure(type(error).__name__, 1, f"unforeseen failure: {error}", fix="please report it")
    return dataclasses.replace(failure, text=trace + failure.text)


_SHARED = {"finetune", "quantize-vit"}  # commands that several processes of torchrun run together


def common_options(*, dry_run: bool = False) -> Decorator:
    """Decorator: adds --json, --quiet and --verbose, and --dry-run if `dry_run` is set; configures logging.

    The command receives `console: Console` and, with `dry_run`, `dry_run: bool` as keyword arguments. Place the
    decorator below `@click.command`, next to the other options.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, json: bool, quiet: bool, verbose: bool, **values: Any) -> Any:
            from fp8pipe.core.progress import setup_logging

            group_console = click.get_current_context().find_object(Console)
            console = group_console or Console()
            console.json, console.quiet, console.verbose = json, quiet, verbose
            setup_logging(json=json, quiet=quiet, verbose=verbose)
            command = click.get_current_context().info_name or ""
            if dry_run and command not in _SHARED:
                from fp8pipe.cli.ranks import require_one_process

                require_one_process(command)
            result = function(*args, console=console, **values)
            if group_console is None:
                console.finish()
            return result

        return wrapper

    options = [
        click.option("--verbose", "-v", is_flag=True, help="Debug messages on stderr."),
        click.option("--quiet", "-q", is_flag=True, help="No progress; print only what was written."),
        click.option("--json", is_flag=True, help="One JSON document on stdout, the rest on stderr."),
        decorate,
    ]
    if dry_run:
        options.insert(0, click.option("--dry-run", is_flag=True, help="Show the plan; write nothing."))
    return stacked(options)


def stage_options(*names: str) -> Decorator:
    """Decorator: adds the named options; names are `output`, `config`, `force`, `resume` and `device`."""
    path, file = PATH, click.Path(path_type=Path, dir_okay=False, readable=False)
    options = {
        "output": click.option("--output", required=True, type=path, help="The artifact's directory."),
        "config": click.option("--config", type=file, help="YAML file of settings; options win over it."),
        "force": click.option("--force", is_flag=True, help="Replace an existing artifact."),
        "resume": click.option("--resume", is_flag=True, help="Continue the unfinished run of --output."),
        # Same choices and help text as the `device` field in the option models of other commands.
        "device": click.option("--device", type=click.Choice(DEVICES), help=f"{DEVICE_HELP}  [default: auto]"),
    }

    return stacked([options[name] for name in names])


def stacked(decorators: Sequence[Callable[..., Any]]) -> Decorator:
    """Combine several decorators into one; help lists their options in this order."""
    return lambda function: functools.reduce(lambda made, decorator: decorator(made), reversed(decorators), function)


def show_plan(console: Console, plan: Plan, quiet_text: str = "", **facts: Any) -> None:
    """Report a dry run: print the plan, and add it and further `facts` to the JSON document."""
    console.emit({"dry_run": True, **facts, "plan": plan.document()}, plan.text(), quiet_text=quiet_text)


def show_artifact(
    console: Console, artifact: Artifact, lines: Sequence[str], following: str, *, remedy: str, **facts: Any
) -> None:
    """Report a stage's result: what was written, its gates and warnings, and further `facts`.

    If a gate failed, the command ends with exit code 14, and no next step is suggested.

    Args:
        console: the command's console.
        artifact: the artifact that was written.
        lines: text for people.
        following: the next command, suggested if all gates passed.
        remedy: what the user can do if a gate failed.
        facts: further entries for `--json`.

    Raises:
        GateFailedError: a gate of the artifact failed; the document is printed all the same.
    """
    manifest = artifact.manifest
    text = "\n".join([*lines, *next_step(artifact, following)])
    document = {
        "artifact": str(artifact.root), "digest": artifact.digest, "kind": artifact.kind, **facts,
        "gates": [gate.model_dump(mode="json") for gate in manifest.gates], "warnings": manifest.warnings,
    }  # fmt: skip
    console.emit(document, text, quiet_text=str(artifact.root))
    require_gates(artifact, remedy)


def next_step(artifact: Artifact, following: str) -> list[str]:
    """The line that suggests the next command; empty if a gate of the artifact failed."""
    return [f"  next: {following}"] if all(gate.passed for gate in artifact.manifest.gates) else []


def require_gates(artifact: Artifact, remedy: str) -> None:
    """End the command with exit code 14 if a gate of its output failed; `remedy` says what the user can do.

    Raises:
        GateFailedError: describes every failed gate.
    """
    from fp8pipe.artifact.gate import failures

    if failed := failures(artifact.manifest.gates):
        raise GateFailedError(
            f"{artifact.root} was written, but not every gate passed", why="; ".join(failed), fix=remedy
        )


def _failure(
    kind: str, exit_code: int, what: str, why: str = "", fix: str = "", *, findings: Sequence[Any] = ()
) -> Failure:
    document: dict[str, Any] = {"type": kind, "exit_code": exit_code, "what": what, "why": why, "fix": fix}
    if findings:
        document["findings"] = [
            dataclasses.asdict(item) if hasattr(item, "__dataclass_fields__") else str(item) for item in findings
        ]
    lines = (f"error: {what}", why and f"  why: {why}", fix and f"  fix: {fix}")
    return Failure(exit_code, "\n".join(filter(None, lines)), document)


def _as_out_of_memory(error: BaseException) -> OutOfMemoryError | None:
    """The out-of-memory or disk-full error that caused `error`, if any; imports nothing heavy."""
    if is_disk_full(error):
        return OutOfMemoryError("the disk is full", why=str(error), fix="free space, or use another disk")
    if isinstance(error, OSError):
        return None
    torch = sys.modules.get("torch")
    on_device = torch is not None and isinstance(error, torch.OutOfMemoryError)
    # torch's CPU allocator raises a plain RuntimeError.
    on_cpu = "not enough memory: you tried to allocate" in str(error) or "can't allocate memory" in str(error)
    if not (isinstance(error, MemoryError) or on_device or on_cpu):
        return None
    return OutOfMemoryError(
        "out of GPU memory" if on_device else "out of memory",
        why=first_line(error) if str(error).strip() else "an allocation failed",
        fix=f"use a smaller batch, shorter sequences or a smaller model{', or --device cpu' if on_device else ''}",
    )


def _as_unusable_path(error: BaseException) -> ConfigurationError | None:
    """A ConfigurationError if `error` means that the system refuses to read or write a path given by the user."""
    if not isinstance(error, OSError) or error.filename is None or error.errno not in _UNUSABLE:
        return None
    fix = "check the path, and who may read and write there"
    return ConfigurationError(f"{error.filename} cannot be used", why=error.strerror or str(error), fix=fix)


def _divert_descriptor() -> int | None:
    """Point file descriptor 1 at stderr and return a copy of the original; None if sys.stdout is not descriptor 1."""
    try:
        if sys.stdout.fileno() != 1:
            return None
    except (OSError, ValueError, AttributeError):
        return None
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    return saved


def _plain(value: Any) -> Any:
    """Convert `value` to types that JSON supports; non-finite floats, paths and all other types become strings."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
