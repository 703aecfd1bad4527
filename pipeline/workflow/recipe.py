"""Recipes: YAML files that list stages, their settings, their dependencies, and the thresholds for their results.

```yaml
name: digits
stages:
  digits:
    command: quantize-vit
    model: sample:vit-digits
    bits: w4a4
  onnx:
    command: export
    artifact: stage:digits
    target: onnx
    gates:
      - {name: size, figure: details.payload_bytes, at_most: 5000000, reason: fits the device}
```

The value `stage:NAME` refers to the output of that stage. The keys of a stage, except `command`, `gates`, `after` and
`resources`, are settings of its command.
"""

from __future__ import annotations

import difflib
import graphlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import Field, field_validator, model_validator

from fp8pipe.core.config import FrozenConfig, assign, build_config, read_yaml
from fp8pipe.core.errors import ConfigurationError, one_line
from pipeline.workflow.resources import Resources

__all__ = [
    "GateSpec", "Recipe", "StageSpec", "load_recipe", "recipe_of", "references", "replace_references",
    "settings_differing", "substitute",
]  # fmt: skip

# Keys of a stage's entry that are not settings of its command.
_NO_SETTINGS: Final = ("command", "gates", "after", "resources")
# A reference to a stage is a whole value, optionally with a prefix: `stage:model`, `artifact:stage:model`.
_REFERENCE: Final = re.compile(r"((?:[a-z]+:)?)stage:(.+)", re.DOTALL)
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_TOP_KEYS: Final = ("name", "description", "stages")


class GateSpec(FrozenConfig):
    """A gate of a recipe: bounds for a figure in a stage's output, or for its difference or ratio to another figure."""

    name: str = Field(min_length=1, description="what the gate requires, in a few words")
    figure: str = Field(
        min_length=1, description="path in the stage's manifest or record, for instance details.heldout_loss.deployed"
    )
    minus: str | None = Field(None, description="a figure to subtract; STAGE#path takes it from another stage")
    over: str | None = Field(None, description="a figure to divide by; STAGE#path takes it from another stage")
    at_least: float | None = Field(None, description="the smallest value accepted")
    at_most: float | None = Field(None, description="the largest value accepted")
    reason: str = Field(min_length=1, description="why this threshold")

    @field_validator("figure", "minus", "over")
    @classmethod
    def _of_today(cls, value: str | None) -> str | None:
        """Replace `extra`, which recipes from before manifest schema 3 use, by `details`."""
        return value if value is None else re.sub(r"(^|#)extra\.", r"\1details.", value)

    @model_validator(mode="after")
    def _bounded(self) -> GateSpec:
        if self.at_least is None and self.at_most is None:
            raise ValueError(f"gate {self.name!r} has neither at_least nor at_most")
        if self.minus is not None and self.over is not None:
            raise ValueError(f"gate {self.name!r}: minus and over cannot both be given")
        return self


@dataclass(frozen=True, slots=True)
class StageSpec:
    """One stage of a recipe."""

    name: str
    command: str
    settings: Mapping[str, Any]  # settings of the command, as written, with unresolved references
    gates: tuple[GateSpec, ...] = ()
    after: tuple[str, ...] = ()  # stages that must finish first although this stage does not read their output
    reads: Mapping[str, str] = field(default_factory=dict)  # stages whose output it reads, by dotted setting
    resources: Resources = field(default_factory=Resources)

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of all stages that must finish before this one."""
        return tuple(dict.fromkeys((*self.reads.values(), *self.after)))


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe with its stages in topological order; settings of commands have not been validated yet."""

    name: str
    description: str
    stages: tuple[StageSpec, ...]

    def stage(self, name: str) -> StageSpec:
        """The stage called `name`.

        Raises:
            ConfigurationError: there is no such stage.
        """
        stages = {stage.name: stage for stage in self.stages}
        if name not in stages:
            raise _no_stage(name, list(stages))
        return stages[name]

    def plain(self) -> dict[str, Any]:
        """The recipe as plain data (dicts, lists, strings, numbers), with all overrides applied."""
        stages: dict[str, Any] = {}
        for spec in self.stages:
            entry: dict[str, Any] = {"command": spec.command, **spec.settings}
            if spec.after:
                entry["after"] = list(spec.after)
            if needed := spec.resources.model_dump(mode="json", exclude_none=True):
                entry["resources"] = needed
            if spec.gates:
                entry["gates"] = [gate.model_dump(mode="json", exclude_none=True) for gate in spec.gates]
            stages[spec.name] = entry
        return {"name": self.name, "description": self.description, "stages": stages}


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: a YAML file.
        overrides: strings of the form `STAGE.KEY=VALUE`, with VALUE parsed as YAML; they override the file.

    Raises:
        ConfigurationError: the recipe is unreadable or malformed, an override or a reference names an unknown stage,
            or stages depend on each other in a cycle.
    """
    values = read_yaml(Path(path))
    values.setdefault("name", Path(path).stem)
    stages = values.get("stages")
    for override in overrides:
        dotted, value = _parse_override(override)
        stage = dotted.split(".")[0]
        if isinstance(stages, dict) and stage not in stages:
            raise _no_stage(stage, list(stages), f"--set {override}")
        assign(values, f"stages.{dotted}", value)
    return recipe_of(values, str(path))


def recipe_of(values: Mapping[str, Any], where: str) -> Recipe:
    """Build a recipe from plain data.

    Args:
        values: the content of a recipe file.
        where: the source of the data, for error messages.

    Raises:
        ConfigurationError: for the same reasons as `load_recipe`.
    """
    unknown = [key for key in values if key not in _TOP_KEYS]
    if unknown:
        raise ConfigurationError(
            f"{where} has unknown keys: {', '.join(map(str, unknown))}", why=f"a recipe holds {', '.join(_TOP_KEYS)}",
            fix="a stage's settings belong below stages.NAME",
        )  # fmt: skip
    stages = values.get("stages")
    if not isinstance(stages, dict) or not stages:
        raise ConfigurationError(
            f"{where} names no stages", why="`stages:` is missing or empty", fix="add `stages: {NAME: {command: ...}}`"
        )
    specs = {str(name): _stage(str(name), entry, where) for name, entry in stages.items()}
    for spec in specs.values():
        for needed in spec.needs:
            if needed not in specs:
                raise _no_stage(needed, list(specs), f"stage {spec.name} of {where}")
    name = str(values.get("name") or "recipe")
    return Recipe(name, str(values.get("description") or ""), tuple(specs[name] for name in _ordered(specs, where)))


def _stage(name: str, entry: Any, where: str) -> StageSpec:
    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"{name!r} cannot name a stage of {where}", why="its output is a directory of that name",
            fix="use small letters, digits and hyphens, at most 63",
        )  # fmt: skip
    stage = f"stage {name} of {where}"
    if not isinstance(entry, dict) or not isinstance(entry.get("command"), str):
        raise ConfigurationError(
            f"{stage} names no command", why="`command:` is missing", fix="add for instance command: export"
        )
    settings = {str(key): value for key, value in entry.items() if key not in _NO_SETTINGS}
    after, gates, resources = entry.get("after") or (), entry.get("gates") or (), entry.get("resources") or {}
    if isinstance(after, str) or not all(isinstance(item, str) for item in after):
        raise ConfigurationError(
            f"{stage}: after is no list of stages", why=f"it is {after!r}", fix="write after: [NAME, ...]"
        )
    if not isinstance(gates, list | tuple) or not all(isinstance(item, dict) for item in gates):
        raise ConfigurationError(
            f"{stage}: gates is no list", why=f"it is {gates!r}", fix="write gates: [{name: ..., ...}]"
        )
    if not isinstance(resources, dict):
        raise ConfigurationError(
            f"{stage}: resources is no mapping", why=f"it is {resources!r}", fix="write resources: {gpus: 1, ...}"
        )
    try:
        judged = tuple(build_config(GateSpec, item) for item in gates)
    except ConfigurationError as error:
        raise ConfigurationError(f"{stage}: a gate has invalid values", why=error.why, fix=error.fix) from error
    try:
        needed = build_config(Resources, resources)
    except ConfigurationError as error:
        raise ConfigurationError(f"{stage}: {error.what}", why=error.why, fix=error.fix) from error
    return StageSpec(name, entry["command"], settings, judged, tuple(after), references(settings), needed)


def _ordered(specs: Mapping[str, StageSpec], where: str) -> list[str]:
    """Stage names in topological order, as close to their order in the recipe as possible.

    Raises:
        ConfigurationError: stages depend on each other in a cycle.
    """
    sorter = graphlib.TopologicalSorter({name: spec.needs for name, spec in specs.items()})
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        raise ConfigurationError(
            f"the stages of {where} wait for each other", why=" -> ".join(error.args[1]),
            fix="remove one of these references",
        ) from error  # fmt: skip
    places, order, ready = list(specs), [], set(sorter.get_ready())
    while ready:
        order.append(first := min(ready, key=places.index))
        ready.remove(first)
        sorter.done(first)
        ready.update(sorter.get_ready())
    return order


def _parse_override(text: str) -> tuple[str, Any]:
    dotted, equals, value = text.partition("=")
    if not equals or "." not in dotted:
        raise ConfigurationError(
            f"--set {text} cannot be read",
            why="it is not STAGE.KEY=VALUE",
            fix="write for instance --set model.steps=80",
        )
    try:
        return dotted.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigurationError(
            f"--set {text} cannot be read", why=one_line(error, None), fix="quote the value"
        ) from error


def _no_stage(name: str, known: Sequence[str], where: str = "") -> ConfigurationError:
    close = difflib.get_close_matches(name, known, n=1)
    return ConfigurationError(
        f"there is no stage named {name!r}" + (f" ({where})" if where else ""),
        why=f"the stages are: {', '.join(known)}",
        fix=f"did you mean {close[0]!r}?" if close else "name one of these",
    )


def references(settings: Mapping[str, Any]) -> dict[str, str]:
    """Names of the stages that the settings reference, by the dotted name of the setting."""
    return {dotted: match[2] for dotted, value in _leaves(settings) if (match := _matched(value))}


def substitute(settings: Mapping[str, Any], paths: Mapping[str, Path]) -> dict[str, Any]:
    """The settings with references replaced by paths; `paths` are the outputs of stages by name."""
    return replace_references(settings, lambda prefix, stage: f"{prefix}{paths[stage]}")


def replace_references(settings: Mapping[str, Any], replacement: Callable[[str, str], Any]) -> dict[str, Any]:
    """The settings with references replaced.

    Args:
        settings: the settings of a stage, which may be nested.
        replacement: called with the prefix of a reference (such as `artifact:`, or empty) and the name of the stage;
            returns the new value of the setting.
    """

    def replaced(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: replaced(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [replaced(item) for item in value]
        match = _matched(value)
        return replacement(match[1], match[2]) if match else value

    return {key: replaced(value) for key, value in settings.items()}


def settings_differing(former: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Descriptions of a stage's changed settings, such as `rounds 5 -> 10`.

    Args:
        former: the stage's entry in the recipe of an earlier run.
        now: the stage's present settings.
    """
    before = dict(_leaves({name: value for name, value in former.items() if name not in _NO_SETTINGS}))
    after = dict(_leaves(now))
    both = ((dotted, *(str(held.get(dotted, "(none)")) for held in (before, after))) for dotted in {**before, **after})
    return [f"{dotted} {old} -> {new}" for dotted, old, new in both if old != new]


def _matched(value: object) -> re.Match[str] | None:
    return _REFERENCE.fullmatch(value) if isinstance(value, str) else None


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{prefix}.{index}")
    else:
        yield prefix, value
