"""Restricts a stored transformers configuration to shapes and components: no code, no files, no hub locations.

transformers turns every key of a configuration into an attribute of its configuration object. Some of these keys choose
kernels, which transformers downloads from the hub and runs; others name a backbone, or arguments of another library
that loads files.
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
# Permitted values of transformers' own settings, wherever they occur in a configuration.
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
# Attributes of the base class that are not dataclass fields.
_COMMON: Final = frozenset(("model_type", "num_labels", "output_attentions", "_name_or_path"))
_LABELS: Final = ("id2label", "label2id")
# Fields that hold a mapping of numbers and names.
_MAPPINGS: Final = ("rope_parameters", "rope_scaling")
_NAME: Final = re.compile(r"[\w.+-]*")


def check_config(directory: Path) -> None:
    """Refuse a config.json that would make transformers fetch or run something, before transformers reads it.

    Raises:
        BadArtifactError: the config.json of an artifact has such a setting.
        ConfigurationError: the config.json of the user's model has such a setting.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # transformers reads the same file and reports the error
    if why := "; ".join(foreign_settings(config)):
        raise unusable(
            path,
            f"{path} holds settings that a stored model may not have",
            why=why,
            fix="take them out, if you trust it",
        )


def foreign_settings(config: Any, place: str = "") -> Iterator[str]:
    """transformers' own settings with values that are not permitted, at any depth, in words."""
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
    """Fields that a transformers configuration class declares; empty for a generic one (`AutoConfig`)."""
    known = dataclasses.fields(config_class) if dataclasses.is_dataclass(config_class) else ()
    return frozenset(field.name for field in known)


def foreign_arguments(config_class: Any, arguments: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """Entries of a stored configuration that are not shapes or components declared by its class, in words."""
    declared = declared_fields(config_class)
    for name, value in arguments.items():
        where = place + name
        parts = value if isinstance(value, list | tuple) else [value]
        if name in _MAPPINGS and isinstance(value, Mapping):
            parts = [*value, *value.values()]
        if name not in declared | _COMMON or (name in _OTHER_MODELS and value):
            yield (
                f"{where} is not a setting of {config_class.__name__}" if name not in declared else f"{where} is given"
            )
        elif isinstance(value, Mapping) and name in config_class.sub_configs:
            yield from foreign_arguments(config_class.sub_configs[name], value, f"{where}.")
        elif name not in _LABELS and not all(_plain(part) for part in parts):
            yield f"{where} is {value!r}, and may be numbers or names"
    yield from foreign_settings(arguments, place.rstrip("."))


def _plain(value: Any) -> bool:
    named = isinstance(value, str) and _NAME.fullmatch(value) is not None
    pair = isinstance(value, list | tuple) and all(isinstance(part, int | float) for part in value)
    return named or pair or value is None or isinstance(value, int | float)
