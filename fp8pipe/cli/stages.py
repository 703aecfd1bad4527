"""The commands that may be used as stages of a recipe, described for the workflow that runs them.

Nothing heavy is imported here: a run with nothing left to do must not wait for torch.
"""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from exporters.target import choose, kind_of_source, targets
from fp8pipe.artifact.kinds import TUNED_KINDS, VIT_KIND, targets_of
from fp8pipe.core.config import build_config
from fp8pipe.core.devices import DEVICE_HELP, DEVICES, GpuNeed, current_device, resolve_device
from fp8pipe.core.errors import ConfigurationError
from pipeline.workflow import StageCommand

if TYPE_CHECKING:
    from fp8pipe.core.config import FrozenConfig

__all__ = ["stage_commands", "stage_schemas"]

Settings = Mapping[str, Any]
_VALIDATE: Final = ("export", "engine", "device", "against", "images", "vllm_python")
# Kinds of artifact that a command writes, needed to check the settings of a later stage before its input exists.
_LEFT_BY: Final = {"finetune": TUNED_KINDS, "quantize-vit": (VIT_KIND,)}
# For each command, the model that validates its settings file; imported when needed.
_CONFIGS: Final = {
    "finetune": "pipeline.finetune.config:FinetuneConfig", "quantize-vit": "pipeline.vit.config:QuantizeVitConfig",
    "bench": "validation.bench.record:BenchConfig", "serve-check": "validation.bench.record:ServeCheckConfig",
    "validate": "exporters.vllm.form:ServingForm", "evaluate": "validation.tasks.record:EvaluateConfig",
}  # fmt: skip
_TEXT: Final = {"type": "string"}


def stage_commands() -> dict[str, StageCommand]:
    """The commands that a recipe may use as stages, by name."""
    found = (
        _training("finetune", "model", "data"),
        _training("quantize-vit", "model", "calibration", "evaluate"),
        StageCommand("export", ("artifact",), _check_export, _export_arguments, _in_run, ("artifact", "target")),
        StageCommand(
            "validate", ("export", "against", "images"), _check_validate, _validate_arguments, _beside("validation"),
            _VALIDATE, environment=_several_processes, versions=_vllm_versions, device=_device_of_engine,
        ),
        replace(_measurement("bench", "export", "vllm_python"), device=_device_of_engine),
        _measurement("serve-check", "export"),
        replace(
            _measurement("evaluate", "export", "vllm_python"), sources=("export", "against", "task_dir"),
            without_effect=("timeout_s",),
        ),
    )  # fmt: skip
    return {command.name: command for command in found}


def stage_schemas() -> dict[str, dict[str, Any]]:
    """The JSON schema of each command's settings, by command name; imports every package."""
    schemas = {name: _config(name).model_json_schema() for name in _CONFIGS}
    for target in targets():
        schema = target.options.model_json_schema()
        schema["properties"].pop("force", None)
        named = {"artifact": _TEXT, "target": {"const": target.name}}
        schemas[f"export {target.name}: {target.help}"] = _with(schema, named, ("artifact", "target"))
    for name in ("bench", "serve-check", "evaluate"):
        schemas[name] = _with(schemas[name], {"export": _TEXT}, ("export",))
    texts: dict[str, Any] = dict.fromkeys(_VALIDATE, _TEXT)
    texts |= {"engine": {"enum": _engines()}, "device": {"enum": [*DEVICES], "description": DEVICE_HELP}}
    schemas["validate"] = _with(schemas["validate"], texts, ("export",))
    return schemas


def _with(schema: dict[str, Any], properties: dict[str, Any], required: tuple[str, ...]) -> dict[str, Any]:
    merged = {**schema, "properties": {**properties, **schema["properties"]}}
    merged["required"] = [*required, *schema.get("required", ())]
    return merged


def _config(name: str) -> type[FrozenConfig]:
    found: type[FrozenConfig] = pkgutil.resolve_name(_CONFIGS[name])
    return found


def _training(name: str, *sources: str) -> StageCommand:
    """A command that creates an artifact from a model and data."""

    def check(settings: Settings, read: Mapping[str, str]) -> None:
        build_config(_config(name), settings)

    def arguments(settings: Settings, output: Path, file: Path) -> list[str]:
        return [name, "--config", str(file), "--output", str(output)]

    def device(settings: Settings) -> str:
        try:
            return current_device(build_config(_config(name), settings))  # type: ignore[arg-type]
        except ConfigurationError:  # reported by `check`, with the stage's name
            return str(settings.get("device"))

    return StageCommand(
        name, sources, check, arguments, _in_run, resumable=True, device=device, parallel=True,
        without_effect=("report_to",), check_processes=_check_micro_batches if name == "finetune" else _any_number,
    )  # fmt: skip


def _any_number(settings: Settings, count: int) -> None:
    """Processes of quantize-vit share images, of which there are always more."""


def _check_micro_batches(settings: Settings, count: int) -> None:
    from pipeline.finetune.config import check_processes

    check_processes(build_config(_config("finetune"), settings), count)  # type: ignore[arg-type]


def _measurement(name: str, *inline: str) -> StageCommand:
    """A command that runs an export and writes a record next to it; `inline` settings are not written to its file."""

    def check(settings: Settings, read: Mapping[str, str]) -> None:
        _require_export(settings, read)
        build_config(
            _config(name), {key: value for key, value in settings.items() if key not in ("export", "vllm_python")}
        )

    def arguments(settings: Settings, output: Path, file: Path) -> list[str]:
        python = settings.get("vllm_python")
        extra = [] if python is None else ["--vllm-python", str(python)]
        return [name, str(settings["export"]), "--config", str(file), *extra]

    return StageCommand(
        name, ("export",), check, arguments, _beside(name), inline, environment=_several_processes,
        versions=_vllm_versions,
    )  # fmt: skip


def _check_export(settings: Settings, read: Mapping[str, str]) -> None:
    _require(settings, "artifact", "target")
    rest = {key: value for key, value in settings.items() if key not in ("artifact", "target")}
    if "force" in rest:
        raise ConfigurationError("force is not a setting of a stage", why="force: the run replaces what is out of date")
    maker = read.get("artifact")
    kinds = (kind_of_source(str(settings["artifact"])),) if maker is None else _LEFT_BY.get(maker, (maker,))
    try:
        target = choose(str(settings["target"]), kinds[0], rest.get("format"))
    except ConfigurationError as error:
        fitting = " or ".join(targets_of(kinds[0]))
        why = error.why if maker is None or not fitting else f"the output of {maker} can be exported to {fitting}"
        raise ConfigurationError(f"target {settings['target']} does not fit", why=f"target: {why}") from error
    build_config(target.options, rest)


def _form(settings: Settings) -> dict[str, Any]:
    """The settings of a `validate` stage that are fields of `ServingForm`: how a language export is served."""
    return {key: value for key, value in settings.items() if key not in _VALIDATE}


def _engines() -> list[str]:
    return list(dict.fromkeys(engine.name for target in targets() for engine in target.engines))


def _check_validate(settings: Settings, read: Mapping[str, str]) -> None:
    _require_export(settings, read)
    form = _form(settings)
    known = (*_VALIDATE, *_config("validate").model_fields)
    unknown = [key for key in form if key not in known]
    if unknown:
        why = f"{', '.join(unknown)}: unknown key, known keys: {', '.join(known)}"
        raise ConfigurationError("validate has unknown settings", why=why)
    build_config(_config("validate"), form)
    for name, known_ones in (("engine", _engines()), ("device", DEVICES)):
        if settings.get(name) not in (None, *known_ones):
            raise ConfigurationError(f"unknown {name}", why=f"{name}: choose from {', '.join(known_ones)}")


def _require_export(settings: Settings, read: Mapping[str, str]) -> None:
    _require(settings, "export")
    if read.get("export", "export") != "export":
        raise ConfigurationError(
            "not an export", why=f"export: it refers to a stage that runs {read['export']}, not export"
        )


def _require(settings: Settings, *names: str) -> None:
    missing = [name for name in names if not isinstance(settings.get(name), str)]
    if missing:
        raise ConfigurationError("settings are missing", why=f"{', '.join(missing)}: required and not given")


def _in_run(settings: Settings, directory: Path, name: str) -> Path:
    return directory / name


def _beside(stage: str) -> Callable[[Settings, Path, str], Path]:
    def output(settings: Settings, directory: Path, name: str) -> Path:
        _require(settings, "export")
        export = Path(os.path.abspath(settings["export"]))
        record = export.with_name(f"{export.name}.{stage}.json")
        inside = Path(os.path.abspath(directory))
        return directory / record.relative_to(inside) if record.is_relative_to(inside) else record

    return output


def _export_arguments(settings: Settings, output: Path, file: Path) -> list[str]:
    fixed = ["export", str(settings["artifact"]), "--target", str(settings["target"]), "--output", str(output)]
    return [*fixed, "--config", str(file)]


def _validate_arguments(settings: Settings, output: Path, file: Path) -> list[str]:
    named = [key for key in _VALIDATE if key != "export" and settings.get(key) is not None]
    flags = [[f"--{key.replace('_', '-')}", str(settings[key])] for key in named]
    config = ["--config", str(file)] if _form(settings) else []
    return ["validate", str(settings["export"]), *(part for flag in flags for part in flag), *config]


def _vllm_versions(settings: Settings) -> Mapping[str, str]:
    """Versions of vLLM and its dependencies in the environment that the stage would use; empty if there is none."""
    return _versions_in(settings.get("vllm_python"))


def _device_of_engine(settings: Settings) -> str:
    """The device of a stage that runs an engine; for `auto`, whether this machine has a GPU.

    The engine is not known yet, so its own requirements cannot be checked here.
    """
    asked = settings.get("device") or "auto"
    return resolve_device("auto", GpuNeed("an engine")).name if asked == "auto" else str(asked)


@cache
def _versions_in(python: str | None) -> Mapping[str, str]:
    from exporters.vllm.environment import find_vllm_python, inspect_environment
    from fp8pipe.core.errors import MissingCapabilityError

    try:
        return inspect_environment(find_vllm_python(python)).versions
    except MissingCapabilityError:
        return {}


def _several_processes(settings: Settings) -> Mapping[str, str]:
    """Environment variables for engines with several processes: idle OpenMP threads must not spin and block them."""
    return {"OMP_WAIT_POLICY": "passive"}
