"""What a section is made of. The template knows how each block looks; sections know nothing of HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "Block", "Code", "Drawing", "Drawings", "Lines", "Missing", "Node", "Picture", "Pictures",
    "Section", "Table", "Text", "Tree",
]  # fmt: skip

Cell = Any
"""A string, or something with `__html__`: a Figure, a Badge, a Digest."""


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph; `parts` are joined as they are."""

    parts: Sequence[Cell]
    title: str = ""
    tone: str = ""


@dataclass(frozen=True, slots=True)
class Missing:
    """Data that is not there, and the command that would make it."""

    what: str
    command: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a head; columns named in `numeric` are set right, with equal digits.

    A `folded` table opens at a click, and on paper; where `printed` is false, not on paper (a drawing shows the same).
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    numeric: Sequence[int] = ()
    folded: bool = False
    printed: bool = True


@dataclass(frozen=True, slots=True)
class Lines:
    """Sentences, one a line."""

    title: str
    lines: Sequence[Cell]


@dataclass(frozen=True, slots=True)
class Drawing:
    """An SVG (markup) with its caption; the parts are joined as they are."""

    svg: Any
    caption: Sequence[Cell]


@dataclass(frozen=True, slots=True)
class Drawings:
    """Drawings side by side."""

    drawings: Sequence[Drawing]


@dataclass(frozen=True, slots=True)
class Picture:
    """An image as a data URL, what it shows, and the file it was made of."""

    url: str
    alt: str
    caption: str
    source: str
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Pictures:
    """Pictures side by side."""

    pictures: Sequence[Picture]
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Code:
    """Text to copy."""

    text: str
    caption: str = ""
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Node:
    """A node of a tree."""

    parts: Sequence[Cell]
    children: list[Node] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Tree:
    """A tree of what was made from what."""

    roots: Sequence[Node]


Block = Text | Missing | Table | Lines | Drawing | Drawings | Pictures | Code | Tree


@dataclass(frozen=True, slots=True)
class Section:
    """One section."""

    key: str  # its anchor
    title: str
    lead: str  # what it shows, one or two sentences
    blocks: list[Block]
