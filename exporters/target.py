"""Defines an export target, and holds the registry of all targets.

A target is one object: which artifacts it accepts, its option model, and references to the functions that plan,
export, verify, validate and serve it. The command line, its help, the JSON schema, `verify`, the report, the model card
and `serve` all query this registry; no other code refers to a kind of export by name. A new format is one folder with
such an object plus one line in `_BUILTIN`; a third-party package calls `register` itself.

Functions are given as `module:function` strings and imported only when called, so help and schema do not need torch,
and a target may refer to packages above this one (validation, serving) without importing them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

from fp8pipe.artifact.finding import Finding
from fp8pipe.artifact.kinds import ArtifactKind, Details, Migration, register_kind, unregister_kind
from fp8pipe.artifact.manifest import MANIFEST_NAME
from fp8pipe.artifact.reader import Artifact, open_artifact
from fp8pipe.core.config import FrozenConfig
from fp8pipe.core.devices import Device, DeviceName, say
from fp8pipe.core.errors import ConfigurationError, MissingCapabilityError
from fp8pipe.core.plan import install_command

__all__ = [
    "PLAIN_MODEL", "Engine", "ExportTarget", "Reference", "Service", "call", "choose", "choose_engine",
    "engine_device", "foresee", "kind_of_source", "load", "open_export", "open_served", "register", "target_of",
    "targets", "unregister",
]  # fmt: skip

# What a target may accept besides artifacts: a model without a manifest.
PLAIN_MODEL: Final = "model"
_BUILTIN: Final = (
    "exporters.vllm.target", "exporters.onnx.target", "exporters.tensorrt.target", "exporters.tensorrt.language.target",
    "exporters.modelopt.target",
)  # fmt: skip

Reference = str | Callable[..., Any]


def call(reference: Reference, *args: Any, **kwargs: Any) -> Any:
    """Call a function that is given directly, or by name as `module:function`.

    Raises:
        MissingCapabilityError: its module imports a package that is not installed.
    """
    if not isinstance(reference, str):
        return reference(*args, **kwargs)
    module, _, name = reference.partition(":")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", module.partition(".")[0]):
            raise  # the reference itself is wrong, not one of the imports of its module
        raise MissingCapabilityError(
            f"{module} needs a package that is not installed", why=str(error),
            fix=install_command(package.replace("_", "-")),
        ) from error  # fmt: skip
    return getattr(found, name)(*args, **kwargs)


@dataclass(frozen=True, slots=True)
class Engine:
    """An engine that can run the exports of a target in order to validate them."""

    name: str  # as in `--engine`
    validate: Reference  # `(export, **given) -> record`; on rejection raises `ExportRejectedError` with it
    describe: Reference  # `(export, record) -> str`, a human-readable summary
    takes: tuple[str, ...] = ()  # options that `validate` supports, by their Python names


@dataclass(frozen=True, slots=True)
class Service:
    """How exports of a target are served and benchmarked, and how their service is checked."""

    domain: Literal["language", "vision"]  # decides which options apply and which server is started
    # `(export, config, language_config) -> exit code`; None if it cannot be served, for the reason in `refusal`
    serve: Reference | None = None
    refusal: str = ""  # why it cannot be served
    plan: Reference | None = None  # `(artifact, stage, record, **given) -> Plan` for validate, bench and serve-check
    bench: Reference | None = None  # `(export, config, **given) -> MeasureRecord`; None if it cannot be benchmarked
    # `(url, artifact, config) -> (requests, gates)` for serve-check; None if there is no such check
    ask: Reference | None = None
    # `(artifact, folder, **given) -> None`: writes the files of a model in a Triton repository
    repository: Reference | None = None
    # `(asked, stage, **given) -> Device | None`: the device it computes on, or an error; None if it has no effect
    device: Reference | None = None


@dataclass(frozen=True, slots=True)
class ExportTarget:
    """One form in which an artifact can be exported."""

    name: str  # as in `--target`; targets that share a name differ in the sources they accept or in their formats
    kind: str  # kind of the artifacts it writes
    takes: tuple[str, ...]  # kinds of artifact it accepts as a source; PLAIN_MODEL for a model without a manifest
    options: type[FrozenConfig]  # its option model; a `force` field in it means that an existing output is replaced
    details: type[Details]  # the target-specific part of its manifests
    help: str  # what it writes, in a few words
    export: Reference  # `(source, output, options) -> Artifact`
    plan: Reference  # `(source, output, options) -> (document, Plan)`
    verify: Reference  # `(artifact, parent, notes) -> Iterator[Finding]`: files against manifest and parent
    # values of `--format` that select this target where several accept the same source; empty for the default target
    formats: tuple[str, ...] = ()
    engines: tuple[Engine, ...] = ()  # engines that can validate its exports, the default one first
    # how exports are served and benchmarked
    service: Service = field(default_factory=lambda: Service("vision", refusal="fp8pipe cannot serve this kind"))
    after: Reference | None = None  # `(artifact) -> list[str]`: lines to print after an export
    # `(root, kind, trained) -> {options: findings}`: what each format would refuse about the artifact of `kind` in
    # `root`, or about one yet to be trained from the model there; `trained` names its linears; reads headers only
    foresee: Reference | None = None
    label: str = ""  # shown in the help before options that only some targets have; defaults to the name
    migrate: Migration = lambda data: data  # converts its manifests of older schemas to the current one


_targets: dict[str, ExportTarget] = {}


def register(target: ExportTarget) -> None:
    """Add a target to the registry.

    Raises:
        ConfigurationError: its kind is already registered, or another target of that name accepts the same source.
    """
    load()
    _add(target)


def _add(target: ExportTarget) -> None:
    if target.kind in _targets:
        raise ConfigurationError(
            f"the export target {target.kind!r} is registered twice", why="each artifact kind has exactly one target",
            fix="choose another kind, or unregister the existing target",
        )  # fmt: skip
    for other in _targets.values():
        shared = set(other.takes) & set(target.takes)
        if other.name == target.name and shared and not set(other.formats) ^ set(target.formats):
            raise ConfigurationError(
                f"--target {target.name} is ambiguous for {', '.join(sorted(shared))}",
                why=f"it selects both {other.kind} and {target.kind}", fix="give one of them --format values",
            )  # fmt: skip
    register_kind(
        ArtifactKind(
            target.kind, target.details, target.migrate, target.takes, target.name,
            tuple(engine.name for engine in target.engines),
            tuple(name for name, has in (("bench", target.service.bench), ("serve-check", target.service.ask)) if has),
        )
    )  # fmt: skip
    _targets[target.kind] = target


def unregister(kind: str) -> None:
    """Remove a target from the registry."""
    _targets.pop(kind, None)
    unregister_kind(kind)


def targets() -> tuple[ExportTarget, ...]:
    """All export targets, in the order of registration."""
    load()
    return tuple(_targets.values())


def target_of(kind: str) -> ExportTarget | None:
    """The target that writes artifacts of this kind; None if they are not exports."""
    load()
    return _targets.get(kind)


def open_export(export: Path, able: Callable[[ExportTarget], Any]) -> tuple[Artifact, ExportTarget]:
    """Open an export that supports some way of running it, without hashing its files.

    `able` returns a true value for targets that support it.

    Raises:
        BadArtifactError: not an export, or of a kind that does not support it.
    """
    kinds = [target.kind for target in targets() if able(target)]
    artifact = open_artifact(export, kind=kinds, verify=False, caches="engines")
    return artifact, _targets[artifact.kind]


def open_served(export: Path) -> tuple[Artifact, ExportTarget]:
    """Open an export that can be served by this project, without hashing its files.

    Raises:
        BadArtifactError: not an export.
        ConfigurationError: exports of this kind cannot be served.
    """
    artifact, target = open_export(export, lambda known: known.service)
    if target.service.serve is None:
        fitting = [
            known for known in targets() if known.service.serve and known.service.domain == target.service.domain
        ]
        names = dict.fromkeys(f"--target {known.name}" for known in fitting)
        fix = f"export with {' or '.join(names)}, and serve that"
        raise ConfigurationError(f"{export} cannot be served", why=target.service.refusal, fix=fix)
    return artifact, target


def choose_engine(
    artifact: Artifact, target: ExportTarget, name: str | None, options: Mapping[str, Any]
) -> tuple[Engine, dict[str, Any]]:
    """The engine that validates an export, and those of the given options that it supports.

    Without a name this is the default engine; options that are None count as not given.

    Raises:
        ConfigurationError: the engine belongs to another kind of export, or does not support one of the options. Only
            the path of vLLM's Python, which an environment variable may set for all commands, is ignored instead.
    """
    found = next((engine for engine in target.engines if name in (None, engine.name)), None)
    if found is None:
        usual = target.engines[0].name
        raise ConfigurationError(
            f"{artifact.root} cannot be validated in {name}",
            why=f"it is of kind {artifact.kind}, made for {usual}", fix=f"give --engine {usual}, or leave --engine out",
        )  # fmt: skip
    given = {key: value for key, value in options.items() if value is not None}
    foreign = ["the form of serving" if key == "form" else f"--{key.replace('_', '-')}"
               for key in given if key not in (*found.takes, "vllm_python")]  # fmt: skip
    if foreign:
        raise ConfigurationError(
            f"{' and '.join(foreign)} cannot be given for {found.name}", why="this validation does not use it",
            fix="leave it out",
        )  # fmt: skip
    return found, {key: value for key, value in given.items() if key in found.takes}


def engine_device(target: ExportTarget, asked: DeviceName | None, stage: str, **given: Any) -> Device | None:
    """The device that a target's engine computes on in a stage (validate, bench or serve); reports what `auto` means.

    None for targets where the device has no effect, and where the engine is missing, which the command itself reports.

    Raises:
        MissingCapabilityError: a GPU was requested, and the engine would not compute on one.
    """
    if target.service.device is None:
        return None
    wanted: DeviceName = asked or "auto"
    found: Device | None = call(target.service.device, wanted, stage, **given)
    if found is not None:
        say(wanted, found)
    return found


def kind_of_source(source: Path | str) -> str:
    """The kind of the artifact in a directory; PLAIN_MODEL for anything without a manifest."""
    root = Path(source)
    if (root / MANIFEST_NAME).is_file() or root.name.endswith(".partial"):
        return open_artifact(root, verify=False).kind
    return PLAIN_MODEL


def choose(name: str, kind: str, format: str | None = None) -> ExportTarget:
    """The target that `--target NAME` selects for a source of this kind.

    `kind` may be PLAIN_MODEL; `format` is the value of `--format`.

    Raises:
        ConfigurationError: no target of that name accepts such a source.
    """
    named = [target for target in targets() if target.name == name]
    fitting = [target for target in named if kind in target.takes]
    asked = [target for target in fitting if format in target.formats]
    usual = [target for target in fitting if not target.formats]
    if asked or usual:
        return (asked or usual)[0]
    if fitting:
        return fitting[0]
    others = dict.fromkeys(target.name for target in _targets.values() if kind in target.takes)
    taken = ", ".join(dict.fromkeys(kind for target in named for kind in target.takes))
    what = "a model without a manifest" if kind == PLAIN_MODEL else f"an artifact of kind {kind!r}"
    raise ConfigurationError(
        f"--target {name} does not accept this source",
        why=f"it is {what}; {name} accepts {taken or 'nothing: it is unknown'}",
        fix=f"--target {' or --target '.join(others)}" if others else "name an artifact of finetune or quantize-vit",
    )  # fmt: skip


def foresee(root: Path, kind: str, trained: Collection[str] = ()) -> dict[str, list[Finding]]:
    """What each format of export would refuse, by the options that select it, the default first; see `ExportTarget`."""
    forms: dict[str, list[Finding]] = {}
    for target in targets():
        if target.foresee is not None and kind in target.takes:
            forms |= call(target.foresee, root, kind, trained)
    return forms


@cache
def load() -> None:
    """Register the built-in targets once; called by every function that queries the registry."""
    for module in _BUILTIN:
        _add(importlib.import_module(module).TARGET)
