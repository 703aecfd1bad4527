"""Generates a command's options from the models that validate its settings.

Choices, defaults and help texts are defined once, on the model's fields. An option that is not given has no value, so
that only explicit options override `--config`. The model rejects values out of range, reporting all errors at once.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin

import click
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fp8pipe.cli.common import PATH, Decorator, format_bytes, stacked
from fp8pipe.core.config import Flag, FrozenConfig, assign, build_config, parse_size, read_yaml

__all__ = ["Option", "foreign", "model_options", "options_of", "resolve", "union_options"]

T = TypeVar("T", bound=FrozenConfig)


@dataclass(frozen=True, slots=True)
class Option:
    """A model field as a command-line option."""

    path: str  # key of its value; dotted for a field of a nested model, such as `synthesis.steps`
    flag: str  # name without leading dashes
    field: FieldInfo

    @property
    def parameter(self) -> str:
        """click's parameter name, which must be an identifier."""
        return self.path.replace(".", "__")

    @property
    def kind(self) -> tuple[Any, dict[str, Any]]:
        """The type of a value, and the keyword arguments for click if the option takes several values.

        The type is a class, a tuple of choices, or `parse_size`.
        """
        kind = _annotation(self.field)
        if get_origin(kind) is not tuple:
            return kind, {}
        first, *rest = get_args(kind)
        return first, {"multiple": True} if rest == [...] else {"nargs": len(rest) + 1}

    def help(self) -> str:
        """The description, the default and the permitted range."""
        bounds = [f"{sign} {getattr(item, name):g}" for item in self.field.metadata
                  for name, sign in _BOUNDS if getattr(item, name, None) is not None]  # fmt: skip
        default = self._default()
        required = "required, here or in --config" if self.field.is_required() else ""
        facts = "; ".join(filter(None, (required, default and f"default: {default}", ", ".join(bounds))))
        return f"{(self.field.description or '').rstrip('.')}.{f'  [{facts}]' if facts else ''}"

    def _default(self) -> str:
        value, words = self.field.get_default(call_default_factory=False), _marker(self.field).default
        if words or value is None or value is PydanticUndefined or value == ():
            return words
        if isinstance(value, bool):
            return self.flag if value else f"no-{self.flag}"
        if isinstance(value, tuple):
            return " ".join(map(str, value))
        return format_bytes(value) if self.kind[0] is parse_size else str(value)


_BOUNDS: Final = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))


def options_of(model: type[FrozenConfig], above: str = "") -> Iterator[Option]:
    """The fields that are options, in the model's order; includes nested fields that have a flag of their own."""
    for name, field in model.model_fields.items():
        kind, marker = _annotation(field), _marker(field)
        if isinstance(kind, type) and issubclass(kind, FrozenConfig):
            yield from options_of(kind, f"{above}{name}.")
        elif not marker.config_only and (marker.name or not above):
            yield Option(f"{above}{name}", marker.name or name.replace("_", "-"), field)


def model_options(model: type[FrozenConfig]) -> Decorator:
    """Decorator: adds the model's fields as options, passed as keyword arguments; hand them to `resolve`."""
    return union_options({"": model})


def union_options(models: Mapping[str, type[FrozenConfig]]) -> Decorator:
    """Decorator: adds the options of several models, only some of which apply to a run; shared flags appear once.

    Args:
        models: by label. The label precedes the help text of a flag that does not apply to all models; use "" for a
            model that always applies.

    Raises:
        TypeError: models use the same flag for values of different types, or for different fields.
    """
    uses: dict[str, list[tuple[str, Option]]] = {}
    for label, model in models.items():
        for option in options_of(model):
            uses.setdefault(option.flag, []).append((label, option))
    return stacked([_click_option(found, len(models)) for found in uses.values()])


def foreign(given: Mapping[str, object], *models: type[FrozenConfig]) -> list[str]:
    """The given flags that none of `models` has, as written on the current command line.

    `given` maps parameter names to values; None and () count as not given. `models` are the models that were chosen.
    """
    known = {option.parameter for model in models for option in options_of(model)}
    context = click.get_current_context(silent=True)
    parameters = {} if context is None else {parameter.name: parameter for parameter in context.command.params}
    flags = []
    for name, value in given.items():
        if value is None or value == () or name in known:
            continue
        parameter = parameters.get(name)
        spelled = [f"--{name.replace('_', '-')}"] if parameter is None else parameter.opts
        flags.append((parameter.secondary_opts if parameter and value is False else spelled)[0])
    return flags


def resolve(model: type[T], config: Path | None, options: Mapping[str, object], **more: object) -> T:
    """Read the settings of `config` and override them with the options that were given.

    Args:
        model: validates the settings.
        config: a YAML file, or None.
        options: by parameter name; None and () count as not given, and options of other models are ignored.
        more: fields that are not options; they take precedence.

    Raises:
        UsageError: a required option is missing, and there is no file that could contain it.
        ConfigurationError: the file cannot be read, or values are rejected.
    """
    values = {} if config is None else read_yaml(config)
    missing = []
    for option in options_of(model):
        value = options.get(option.parameter)
        if value is not None and value != ():
            assign(values, option.path, value)
        elif config is None and option.field.is_required():
            missing.append(f"--{option.flag}")
    if missing:
        raise click.UsageError(f"Missing option {' and '.join(missing)} (or a --config file that sets it).")
    return build_config(model, {**values, **more})


class _Size(click.ParamType[int]):
    """A number of bytes: `5GB` (10^9), `5GiB` (2^30), `1000`."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            return parse_size(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _click_option(uses: list[tuple[str, Option]], everywhere: int) -> Decorator:
    """The click option for a flag.

    Args:
        uses: label and option of each model that has the flag.
        everywhere: the number of all models.

    Raises:
        TypeError: the models use the flag for different fields or for values of different types.
    """
    first = uses[0][1]
    kinds, several = [option.kind[0] for _, option in uses], first.kind[1]
    if all(isinstance(kind, tuple) for kind in kinds):  # the union of all models' choices
        kinds = [tuple(dict.fromkeys(choice for kind in kinds for choice in kind))]
    if {option.path for _, option in uses} != {first.path} or any(option.kind[1] != several for _, option in uses):
        raise TypeError(f"--{first.flag} stands for different fields")
    if any(kind != kinds[0] for kind in kinds):
        raise TypeError(f"--{first.flag} is of several types: {kinds}")
    flag = f"--{first.flag}/--no-{first.flag}" if kinds[0] is bool else f"--{first.flag}"
    typed: dict[str, Any] = {} if kinds[0] is bool else {"type": _click_type(kinds[0])}
    return click.option(flag, first.parameter, default=None, help=_joined(uses, everywhere), **typed, **several)


def _joined(uses: list[tuple[str, Option]], everywhere: int) -> str:
    """The combined help: each distinct text once, preceded by the labels that it applies to."""
    texts: dict[str, list[str]] = {}
    for label, option in uses:
        texts.setdefault(option.help(), []).append(label)
    if len(texts) == 1 and len(uses) == everywhere:
        return next(iter(texts))
    return " ".join(text if "" in labels else f"{', '.join(labels)}: {text}" for text, labels in texts.items())


def _annotation(field: FieldInfo) -> Any:
    """A field's type without None: a class, `tuple[...]`, a tuple of choices, or `parse_size` for sizes."""
    kind = field.annotation
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(part for part in get_args(kind) if part is not types.NoneType)
    extra = field.json_schema_extra
    if isinstance(extra, dict) and isinstance(choices := extra.get("enum"), list):
        return tuple(map(str, choices))
    if any(getattr(item, "func", None) is parse_size for item in field.metadata):
        return parse_size
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(item.value for item in kind) if isinstance(kind, type) and issubclass(kind, Enum) else kind


def _marker(field: FieldInfo) -> Flag:
    return next((item for item in field.metadata if isinstance(item, Flag)), Flag())


def _click_type(kind: Any) -> Any:
    if isinstance(kind, tuple):
        return click.Choice(kind)
    if kind is parse_size:
        return _Size()
    return PATH if kind is Path else kind
