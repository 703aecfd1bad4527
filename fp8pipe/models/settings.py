"""What a stored configuration may ask of transformers: shapes and parts, and no code, files or places on the hub.

transformers makes every key of a configuration an attribute of its own object. Some of them choose kernels, which it
fetches from the hub and runs; others name a backbone, or arguments of another library that loads files.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from fp8pipe.models.checkpoint.blame import unusable

__all__ = ["check_config", "declared_fields", "foreign_arguments", "foreign_settings"]

_IMPLEMENTATIONS: Final = (None, "eager", "sdpa", "flex_attention", "batched_mm", "grouped_mm")
_CHOSEN: Final = ("attn_implementation", "experts_implementation")
_TYPES: Final = (None, "auto", "float32", "float16", "bfloat16", "float64")
# Values that settings of the library may have, wherever they stand in a configuration.
_VALUES: Final[Mapping[str, tuple[Any, ...]]] = {
    **{form.format(name): _IMPLEMENTATIONS for name in _CHOSEN for form in ("{}", "_{}", "_{}_internal")},
    **dict.fromkeys(("dtype", "torch_dtype"), _TYPES),
    **dict.fromkeys(("use_kernels", "kernel_config"), (None, False)),
}
# Fields of configuration classes that name other models, or are passed on to another library.
_OTHER_MODELS: Final = frozenset(
    ("architecture", "backbone", "backbone_config", "backbone_kwargs", "model_args", "use_pretrained_backbone",
     "use_timm_backbone")
)  # fmt: skip
# Attributes of the base class that are no fields.
_COMMON: Final = frozenset(("model_type", "num_labels", "output_attentions", "_name_or_path"))
_LABELS: Final = ("id2label", "label2id")
# Fields that hold a mapping of numbers and names.
_MAPPINGS: Final = ("rope_parameters", "rope_scaling")
_NAME: Final = re.compile(r"[\w.+-]*")


def check_config(directory: Path) -> None:
    """Refuse a model whose config.json would have transformers fetch or run something, before transformers reads it.

    Raises:
        BadArtifactError: such a setting, in an artifact.
        ConfigurationError: the same, in a model of the user's.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # transformers reads the same bytes, and refuses them
    if why := "; ".join(foreign_settings(config)):
        raise unusable(
            path,
            f"{path} holds settings that a stored model may not have",
            why=why,
            fix="take them out, if you trust it",
        )


def foreign_settings(config: Any, place: str = "") -> Iterator[str]:
    """Settings of the library with values that are none of its own, at any depth, in words."""
    if isinstance(config, list):
        config = dict(enumerate(config))
    if not isinstance(config, Mapping):
        return
    for key, value in config.items():
        where = f"{place}.{key}" if place else str(key)
        if key in _VALUES and value not in _VALUES[key]:
            known = ", ".join(str(one) for one in _VALUES[key] if one)
            yield f"{where} is {value!r}" + (f", and may be {known}" if known else "")
        yield from foreign_settings(value, where)


def declared_fields(config_class: Any) -> frozenset[str]:
    """What a configuration class of transformers knows; none for one that stands for any (`AutoConfig`)."""
    known = dataclasses.fields(config_class) if dataclasses.is_dataclass(config_class) else ()
    return frozenset(field.name for field in known)


def foreign_arguments(config_class: Any, arguments: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """What in a stored configuration is no shape or part of a vision model that its class declares, in words."""
    declared = declared_fields(config_class)
    for name, value in arguments.items():
        where = place + name
        parts = value if isinstance(value, list | tuple) else [value]
        if name in _MAPPINGS and isinstance(value, Mapping):
            parts = [*value, *value.values()]
        if name not in declared | _COMMON or (name in _OTHER_MODELS and value):
            yield f"{where} is no setting of {config_class.__name__}" if name not in declared else f"{where} is given"
        elif isinstance(value, Mapping) and name in config_class.sub_configs:
            yield from foreign_arguments(config_class.sub_configs[name], value, f"{where}.")
        elif name not in _LABELS and not all(_plain(part) for part in parts):
            yield f"{where} is {value!r}, and may be numbers or names"
    yield from foreign_settings(arguments, place.rstrip("."))


def _plain(value: Any) -> bool:
    named = isinstance(value, str) and _NAME.fullmatch(value) is not None
    pair = isinstance(value, list | tuple) and all(isinstance(part, int | float) for part in value)
    return named or pair or value is None or isinstance(value, int | float)
