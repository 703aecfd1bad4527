"""The building blocks of sections. The template defines how each block looks; sections contain no HTML."""

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
    """A paragraph; the `parts` are concatenated without separators."""

    parts: Sequence[Cell]
    title: str = ""
    tone: str = ""


@dataclass(frozen=True, slots=True)
class Missing:
    """A note that data is missing, and the command that would create it."""

    what: str
    command: str = ""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under a header; columns listed in `numeric` are right-aligned, with digits of equal width.

    A `folded` table is collapsed until it is clicked or the page is printed. A table with `printed=False` is left out
    of the printed page, because a chart shows the same values.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    numeric: Sequence[int] = ()
    folded: bool = False
    printed: bool = True


@dataclass(frozen=True, slots=True)
class Lines:
    """A title and sentences, one per line."""

    title: str
    lines: Sequence[Cell]


@dataclass(frozen=True, slots=True)
class Drawing:
    """An SVG chart (markup) with its caption; the parts of the caption are concatenated without separators."""

    svg: Any
    caption: Sequence[Cell]


@dataclass(frozen=True, slots=True)
class Drawings:
    """Charts side by side."""

    drawings: Sequence[Drawing]


@dataclass(frozen=True, slots=True)
class Picture:
    """An image as a data URL, its description, and the file that it was made from."""

    url: str
    alt: str
    caption: str
    source: str
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Pictures:
    """Images side by side."""

    pictures: Sequence[Picture]
    caption: str = ""


@dataclass(frozen=True, slots=True)
class Code:
    """Preformatted text for copying."""

    text: str
    caption: str = ""
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Node:
    """A node of a `Tree`."""

    parts: Sequence[Cell]
    children: list[Node] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Tree:
    """A tree of artifacts, in which each artifact is a child of the one it was made from."""

    roots: Sequence[Node]


Block = Text | Missing | Table | Lines | Drawing | Drawings | Pictures | Code | Tree


@dataclass(frozen=True, slots=True)
class Section:
    """A section of the report."""

    key: str  # its HTML anchor
    title: str
    lead: str  # one or two sentences on what it shows
    blocks: list[Block]
