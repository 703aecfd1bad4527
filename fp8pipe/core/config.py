"""Configurations as immutable pydantic models, in which every field has a description and unknown keys are errors.

The configuration of a stage is one `FrozenConfig`. Command-line options override its fields, and the resolved values
are stored in the artifact's manifest. Unknown keys are errors, so that a misspelt `leraning_rate` does not lead to an
hour of training with the default. All mistakes are reported in a single error. YAML is read with a safe loader that
also rejects duplicate keys.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from fp8pipe.core.errors import ConfigurationError, one_line

if TYPE_CHECKING:
    import yaml

T = TypeVar("T", bound=BaseModel)


class FrozenConfig(BaseModel):
    """Base class of all configurations: immutable, without unknown keys, and with a description of every field.

    Attributes:
        renamed: for each former name of a field, its current name, which the error for an old recipe then states.

    Raises:
        TypeError: when a subclass is defined with a field that has no description.
    """

    # defer_build: validators are built on first use, because `--help` needs only the fields.
    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, ser_json_inf_nan="strings", defer_build=True
    )
    renamed: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        missing = [name for name, field in cls.model_fields.items() if not field.description]
        if missing:
            raise TypeError(f"{cls.__name__}: these fields have no description: {', '.join(missing)}")


@dataclass(frozen=True, slots=True)
class Flag:
    """Annotation for the command-line option of a field: `Annotated[int, Flag("synthesis-steps")]`.

    Without an annotation, the field `batch_size` has the option `--batch-size`. A field of a nested model has an option
    only if it is annotated with a name.
    """

    name: str = ""  # name of the option, without leading dashes
    default: str = ""  # description of the default for `--help`, if the default depends on something else
    config_only: bool = False  # the field has no command-line option


CONFIG_ONLY: Final = Flag(config_only=True)
_UNITS: Final = {
    "": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40,
}  # fmt: skip


def parse_size(value: object) -> int:
    """Parse a size in bytes: `5GB` is 5 * 10^9, `5GiB` is 5 * 2^30, and a number without a unit is in bytes.

    Raises:
        ValueError: it is not a size of at least one byte; the message shows examples.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", str(value).strip().lower())
    size = round(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise ValueError(f"{value!r} is not a size; write for instance 5GB, 500MB or 2GiB")
    return size


Size = Annotated[int, BeforeValidator(parse_size, json_schema_input_type=int | str)]


def build_config(cls: type[T], values: Mapping[str, object]) -> T:
    """Create a configuration.

    Args:
        cls: class of the configuration.
        values: values of the fields by name; a nested configuration is given as a mapping.

    Raises:
        ConfigurationError: values are invalid or missing, or keys are unknown; the error lists all of them.
    """
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        findings = [_finding(cls, item) for item in error.errors(include_url=False)]
    count, words = len(findings), re.findall(r"[A-Z][a-z0-9]*", cls.__name__)
    # QuantizeVitConfig becomes quantize-vit.
    spoken = "-".join(word.lower() for word in words if word not in ("Config", "Options", "Settings", "Spec"))
    raise ConfigurationError(
        f"the {spoken} settings have {count} invalid {'value' if count == 1 else 'values'}",
        why="; ".join(findings),
        fix="correct the values named above",
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that contains a mapping; an empty file counts as an empty mapping.

    Raises:
        ConfigurationError: the file is unreadable, not YAML, has a duplicate key, or does not contain a mapping.
    """
    import yaml  # imported here to keep `--help` fast

    class UniqueKeyLoader(yaml.SafeLoader):  # safe: plain data only, no Python objects
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
            """Raise an error for a duplicate key, where PyYAML would silently use the last value."""
            seen: set[object] = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                if isinstance(key, Hashable) and key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} is given twice", key_node.start_mark
                    )
                if isinstance(key, Hashable):
                    seen.add(key)
            return super().construct_mapping(node, deep)

    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeyLoader)
    except OSError as error:
        raise ConfigurationError(
            f"cannot read the configuration {path}",
            why=error.strerror or str(error),
            fix="give the path of a readable YAML file",
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"{path} is not valid YAML", why=one_line(error, None), fix="correct the line named above"
        ) from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigurationError(
            f"{path} does not hold a mapping",
            why=f"its top level is a {type(loaded).__name__}",
            fix="write `key: value` lines",
        )
    return {str(key): value for key, value in loaded.items()}


def assign(values: dict[str, Any], dotted: str, value: object) -> None:
    """Set a nested value: `values["a"]["b"] = value` for the dotted key `a.b`. Missing mappings are created.

    Raises:
        ConfigurationError: a part of the key refers to a value that is not a mapping.
    """
    *parents, last = dotted.split(".")
    here = values
    for name in parents:
        child = here.get(name)
        if child is None:
            child = here[name] = {}
        if not isinstance(child, dict):
            raise ConfigurationError(
                f"cannot set {dotted}",
                why=f"{name} is {child!r}, not a group of settings",
                fix=f"set {name} itself, or turn it into a mapping",
            )
        here = child
    here[last] = value


def _finding(cls: type[BaseModel], item: Any) -> str:
    """Describe a pydantic error in one sentence."""
    location: tuple[int | str, ...] = item["loc"]
    name = ".".join(str(part) for part in location) or "(the whole configuration)"
    if item["type"] == "extra_forbidden":
        known, renamed = _fields_at(cls, location[:-1])
        if location[-1] in renamed:
            return f"{name}: unknown key, it is called {renamed[str(location[-1])]!r} now"
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(sorted(known)) or 'none'}"
        return f"{name}: unknown key, {hint}"
    if item["type"] == "missing":
        return f"{name}: required and not given"
    message = str(item["msg"]).removeprefix("Value error, ")
    if not location:
        return message
    return f"{name}: {message[:1].lower()}{message[1:]} (got {item['input']!r})"


def _fields_at(cls: type[BaseModel], location: tuple[int | str, ...]) -> tuple[list[str], Mapping[str, str]]:
    """Field names and `renamed` of the nested configuration at `location`; both empty if it cannot be determined."""
    for part in location:
        field = cls.model_fields.get(str(part))
        annotation = field.annotation if field else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return [], {}
        cls = annotation
    return list(cls.model_fields), cls.renamed if issubclass(cls, FrozenConfig) else {}
