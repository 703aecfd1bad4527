"""What a pass did, so that a caller can count, report and refuse."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Change"]


@dataclass(frozen=True, slots=True)
class Change:
    """The result of one pass.

    Attributes:
        name: the pass.
        changed: names of the layers, sites or nodes it rewrote, in its order.
    """

    name: str
    changed: tuple[str, ...]
