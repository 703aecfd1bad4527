"""Selects the vision model in transformers checkpoints that also contain a text encoder.

Weights of the text encoder are ignored; if any other weights would be ignored, that is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.checkpoint.tensors import PLAIN_FLOATS, header_entries, weight_files
from fp8pipe.models.compat import import_transformers

__all__ = ["check_all_read", "vision_config", "vision_part"]

_TOWERS: Final = frozenset(("vision_config", "text_config"))
# Names of the weights of a text encoder, and of the scale and bias of the text-image similarity.
_TEXT_SIDE: Final = re.compile(r"text_\w+\.|logit_(scale|bias)$")
_SHOWN: Final = 5


def vision_part(name: str, config: Mapping[str, Any]) -> str:
    """The name of the transformers class to load for a checkpoint.

    If the checkpoint has a text encoder, this is the class of its vision model, preferably with the projection, because
    transformers' image features are the projected ones.

    Args:
        name: the class named in config.json.
        config: contents of config.json.

    Returns:
        The name of the vision model's class; `name` itself if there is no text encoder.
    """
    if not name.endswith("Model") or not set(config) >= _TOWERS:
        return name
    stem = name.removesuffix("Model")
    known = (f"{stem}VisionModelWithProjection", f"{stem}VisionModel")
    return next((part for part in known if hasattr(import_transformers(), part)), name)


def vision_config(folder: Path, config: Mapping[str, Any], name: str) -> Any:
    """The configuration to load the class `name` with, for a checkpoint with a text encoder.

    Args:
        folder: the checkpoint's directory.
        config: contents of its config.json.
        name: the class to load, from `vision_part`.

    Returns:
        The vision model's part of the configuration, with the width of the projection, which is stored outside that
        part. None if there is no text encoder, or if the class takes the whole configuration (a classifier).
    """
    if not set(config) >= _TOWERS or name == str((config.get("architectures") or [""])[0]):
        return None
    whole = import_transformers().AutoConfig.from_pretrained(folder, local_files_only=True)
    if hasattr(whole, "projection_dim") and hasattr(whole.vision_config, "projection_dim"):
        whole.vision_config.projection_dim = whole.projection_dim
    return whole.vision_config


def check_all_read(folder: Path, name: str, unread: Iterable[str]) -> None:
    """Raise an error if weights of a checkpoint were not loaded, except those of a text encoder.

    Args:
        folder: the checkpoint's directory.
        name: the class that was loaded.
        unread: names of stored tensors that were assigned to no parameter.

    Raises:
        ConfigurationError: there are such weights, so the loaded model differs from the checkpoint's model.
    """
    lost = sorted(key for key in unread if not _TEXT_SIDE.match(key))
    if lost:
        entries = (entry for file in weight_files(folder) for entry in header_entries(file).values())
        tables = tuple(entry.name for entry in entries if entry.dtype not in PLAIN_FLOATS)  # position indices
        lost = [key for key in lost if not any(table.endswith(key) for table in tables)]
    if lost:
        raise ConfigurationError(
            f"{folder} holds weights that {name} does not use, so it would be another model",
            why=f"not read: {', '.join(lost[:_SHOWN])}{', ...' if len(lost) > _SHOWN else ''}",
            fix="use a checkpoint whose config.json names the class that it was saved from",
        )
