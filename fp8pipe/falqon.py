"""FALQON for custom training loops: `convert` prepares a model, and returns a `Falqon` object to train it with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.falqon.own_loop import Falqon, convert

__all__ = ["Falqon", "convert"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipeline.falqon import own_loop

    return getattr(own_loop, name)
