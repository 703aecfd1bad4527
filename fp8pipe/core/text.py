"""Plain text for people: aligned tables."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["table"]


def table(rows: Sequence[Sequence[object]], indent: str = "  ") -> str:
    """Rows as aligned columns of plain text."""
    cells = [[str(cell) for cell in row] for row in rows]
    columns = range(max(map(len, cells), default=0))
    widths = [max(len(row[i]) for row in cells if i < len(row)) for i in columns]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) for row in cells)
    return "\n".join((indent + line).rstrip() for line in lines)
