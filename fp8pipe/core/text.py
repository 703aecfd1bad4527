"""Plain text for people: aligned tables, sizes with units."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["format_bytes", "table"]


def table(rows: Sequence[Sequence[object]], indent: str = "  ") -> str:
    """Rows as aligned columns of plain text."""
    cells = [[str(cell) for cell in row] for row in rows]
    columns = range(max(map(len, cells), default=0))
    widths = [max(len(row[i]) for row in cells if i < len(row)) for i in columns]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) for row in cells)
    return "\n".join((indent + line).rstrip() for line in lines)


def format_bytes(size: int) -> str:
    """Bytes with a decimal unit: `1.2 GB`."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.4g} TB"
