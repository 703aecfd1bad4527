"""A stage's settings, value by value: references to other stages, and what differs from an earlier recipe."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

__all__ = ["NO_SETTINGS", "references", "replace_references", "settings_differing", "substitute"]

# Of a stage's entry in a recipe, what decides nothing about its output.
NO_SETTINGS: Final = ("command", "gates", "after")
# The whole of a value, or what follows a prefix: `stage:model`, `artifact:stage:model`.
_REFERENCE: Final = re.compile(r"((?:[a-z]+:)?)stage:(.+)", re.DOTALL)


def references(settings: Mapping[str, Any]) -> dict[str, str]:
    """Names of stages in the settings, by the dotted setting that holds the reference."""
    return {dotted: match[2] for dotted, value in _leaves(settings) if (match := _matched(value))}


def substitute(settings: Mapping[str, Any], paths: Mapping[str, Path]) -> dict[str, Any]:
    """The settings with the paths of stages' outputs in the place of references."""
    return replace_references(settings, lambda prefix, stage: f"{prefix}{paths[stage]}")


def replace_references(settings: Mapping[str, Any], replacement: Callable[[str, str], Any]) -> dict[str, Any]:
    """The settings with `replacement(prefix, stage)` in the place of references."""

    def replaced(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: replaced(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [replaced(item) for item in value]
        match = _matched(value)
        return replacement(match[1], match[2]) if match else value

    return {key: replaced(value) for key, value in settings.items()}


def settings_differing(former: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Each setting that is not as it was, for people: `rounds 5 -> 10`.

    Args:
        former: a stage's entry in a resolved recipe.
        now: the settings of a `StageSpec`.
    """
    before = dict(_leaves({name: value for name, value in former.items() if name not in NO_SETTINGS}))
    after = dict(_leaves(now))
    return [
        f"{dotted} {_shown(before, dotted)} -> {_shown(after, dotted)}"
        for dotted in dict.fromkeys((*before, *after))
        if _shown(before, dotted) != _shown(after, dotted)
    ]


def _shown(values: Mapping[str, Any], dotted: str) -> str:
    return str(values[dotted]) if dotted in values else "(none)"


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
