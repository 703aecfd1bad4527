"""An inspection for people: tables, and a histogram in bars."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fp8pipe.cli.common import format_bytes, table

if TYPE_CHECKING:
    from fp8pipe.models.inspection import Contents, LayerView

_SHOWN_OPERATORS = 8


def contents_text(contents: Contents, list_layers: bool) -> str:
    """Formats, facts, the histogram of scales, and every layer if asked for."""
    rows: list[tuple[object, ...]] = [("weights as", "scales", "layers", "size", "codes at an end")]
    for format, granularity, count, size, codes, saturated in contents.by_format():
        rows.append((format, granularity or "-", count, format_bytes(size), _share(saturated, codes)))
    parts = [f"contents: {contents.form}", table(rows)]
    facts = [(name, _fact(value)) for name, value in contents.facts.items()]
    parts += [table(facts)] if facts else []
    scales = contents.scales()
    if scales.count:
        parts.append(f"scales, {scales.count:,} of them, by power of two")
        parts += [f"  {line}" for line in scales.bars()]
        parts += [f"  {scales.bad} are zero, negative or no numbers"] if scales.bad else []
    parts += [f"note: {note}" for note in contents.notes]
    if list_layers:
        parts += ["layers", table([_row(layer) for layer in contents.layers])]
    return "\n".join(parts)


def _row(layer: LayerView) -> tuple[object, ...]:
    shape = "x".join(map(str, layer.shape)) if layer.shape else "-"
    nan = f"{layer.nan} NaN" if layer.nan else ""
    share = _share(layer.saturated, layer.codes)
    low_high = (min(layer.scales.bins), max(layer.scales.bins)) if layer.scales.bins else None
    spread = f"2^{low_high[0]}..2^{low_high[1]}" if low_high else "-"
    return layer.name, layer.format, shape, format_bytes(layer.size_bytes), layer.granularity or "-", share, spread, nan


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.3%}" if whole else "-"


def _fact(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, dict):
        shown = [f"{key} {inner}" for key, inner in list(value.items())[:_SHOWN_OPERATORS]]
        return ", ".join(shown) + (", ..." if len(value) > _SHOWN_OPERATORS else "")
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
