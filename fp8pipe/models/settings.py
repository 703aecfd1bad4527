"""Restricts a stored transformers configuration to the shapes and components of a model, for safety.

transformers turns every key of config.json into an attribute of its configuration object. Some keys select kernels,
which transformers downloads from the hub and runs; others name a backbone model, or are passed to another library that
loads files. Settings that refer to code, files or hub repositories in such a way are rejected.
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
# Permitted values of settings that transformers itself evaluates, at any nesting depth of a configuration.
_VALUES: Final[Mapping[str, tuple[Any, ...]]] = {
    **{form.format(name): _IMPLEMENTATIONS for name in _CHOSEN for form in ("{}", "_{}", "_{}_internal")},
    **dict.fromkeys(("dtype", "torch_dtype"), _TYPES),
    **dict.fromkeys(("use_kernels", "kernel_config"), (None, False)),
}
# Fields of configuration classes that refer to other models, or are passed on to another library; they must be empty.
_OTHER_MODELS: Final = frozenset(
    ("architecture", "backbone", "backbone_config", "backbone_kwargs", "model_args", "use_pretrained_backbone",
     "use_timm_backbone")
)  # fmt: skip
# Permitted attributes of PretrainedConfig that are not dataclass fields.
_COMMON: Final = frozenset(("model_type", "num_labels", "output_attentions", "_name_or_path"))
_LABELS: Final = ("id2label", "label2id")
# Fields whose value may be a mapping; its keys and values must be numbers or names.
_MAPPINGS: Final = ("rope_parameters", "rope_scaling")
_NAME: Final = re.compile(r"[\w.+-]*")


def check_config(directory: Path) -> None:
    """Reject a config.json that would make transformers download or run code; call before transformers reads it.

    Args:
        directory: the model's directory. A missing or malformed config.json is not an error here.

    Raises:
        BadArtifactError: the config.json of an artifact has such a setting.
        ConfigurationError: the config.json of any other model has such a setting.
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
    """Find settings of transformers whose values are not permitted, at any nesting depth.

    Args:
        config: a configuration, or a part of one.
        place: dotted key of `config` within the whole configuration; empty for the whole.

    Yields:
        One message per setting, with its dotted key, its value and the permitted values.
    """
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
    """Names of the dataclass fields of a transformers configuration class; empty for a generic one (`AutoConfig`)."""
    known = dataclasses.fields(config_class) if dataclasses.is_dataclass(config_class) else ()
    return frozenset(field.name for field in known)


def foreign_arguments(config_class: Any, arguments: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """Find entries of a stored configuration that are not permitted, including those of nested configurations.

    Permitted are the fields that the class declares, with numbers or plain names as values.

    Args:
        config_class: the transformers configuration class.
        arguments: the stored configuration.
        place: prefix for the keys in the messages; empty for the outermost configuration.

    Yields:
        One message per entry.
    """
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
