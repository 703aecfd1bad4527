"""Inline SVG charts: curves over steps, and a grid of layers. Every mark carries its value and its source."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fp8pipe.report.figures import Figure, shown

__all__ = ["Point", "Series", "grid", "line_chart"]

_WIDTH, _HEIGHT = 420, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 10, 26, 30
_MARKS = 400
_DOT = Markup('<circle class="{}" cx="{}" cy="{}" r="{}" data-source="{}" data-value="{}"><title>{}</title></circle>')
_LABELS, _CELL = 124, 17
Place = Callable[[float, float], tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Point:
    """A value at a step."""

    step: float
    figure: Figure


@dataclass(frozen=True, slots=True)
class Series:
    """A curve; in a chart with two curves, one is `dashed`, so that they differ in more than colour."""

    label: str
    points: Sequence[Point]
    dashed: bool = False


def line_chart(series: Sequence[Series], title: str, low: float | None = None) -> Markup:
    """A line chart over steps.

    Args:
        series: one or two curves, neither of them empty.
        title: the accessible name: what the values are.
        low: start of the vertical axis, unless a value is lower; None starts it just below the smallest value.

    Returns:
        The SVG element as markup.
    """
    values = [point.figure.value for curve in series for point in curve.points]
    steps = [point.step for curve in series for point in curve.points]
    bottom, top = _range(values, low)
    first, last = min(steps), max(max(steps), min(steps) + 1)

    def place(step: float, value: float) -> tuple[float, float]:
        x = _LEFT + (_WIDTH - _LEFT - _RIGHT) * (step - first) / (last - first)
        return round(x, 2), round(_HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (value - bottom) / (top - bottom), 2)

    parts = [_axes(bottom, top, first, last, place)]
    for index, curve in enumerate(series):
        parts += [_curve(curve, place), _key(curve, index)]
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, _HEIGHT, title, Markup("").join(parts)
    )


def _range(values: Sequence[float], low: float | None) -> tuple[float, float]:
    bottom = min(values) if low is None else min(low, *values)
    top = max(values)
    room = 0.06 * (top - bottom) or 0.5
    return bottom - (room if low is None else 0), top + room


def _axes(bottom: float, top: float, first: float, last: float, place: Place) -> Markup:
    parts = []
    for share in (0.0, 0.5, 1.0):
        value = bottom + share * (top - bottom)
        _, y = place(first, value)
        parts.append(Markup('<path class="rule" d="M{} {}H{}"/>').format(_LEFT, y, _WIDTH - _RIGHT))
        parts.append(_text(_LEFT - 6, y + 4, "end", f"{value:.3g}"))
    middle = round((first + last) / 2)
    between = [(middle, "middle")] if first < middle < last else []
    for step, anchor in ((first, "start"), *between, (last, "end")):
        x, _ = place(step, bottom)
        parts.append(_text(x, _HEIGHT - 10, anchor, f"{step:g}"))
    return Markup("").join(parts)


def _curve(curve: Series, place: Place) -> Markup:
    kept = curve.points[:: max(1, len(curve.points) // _MARKS)]
    at = [place(point.step, point.figure.value) for point in kept]
    kind = "second" if curve.dashed else "first"
    line = Markup('<polyline class="{}" points="{}"/>').format(kind, " ".join(f"{x},{y}" for x, y in at))
    dots = (
        _DOT.format(
            kind, x, y, 2.6 if len(kept) <= 60 else 1.2, point.figure.source, repr(point.figure.value),
            f"{curve.label}, step {point.step:g}: {shown(point.figure.value, point.figure.form)}",
        )
        for point, (x, y) in zip(kept, at, strict=True)
    )  # fmt: skip
    return line + Markup("").join(dots)


def _key(curve: Series, index: int) -> Markup:
    x = _LEFT + 190 * index
    kind = "second" if curve.dashed else "first"
    return Markup('<path class="key {}" d="M{} 11h18"/><text x="{}" y="15">{}</text>').format(
        kind, x, x + 24, curve.label
    )


def _layer_place(name: str) -> tuple[str, int]:
    """A layer's row and column in a grid: its name without its number, and its number (-1 if it has none)."""
    found = re.match(r"(?P<before>.*?)\.(?P<number>\d+)\.(?P<after>.*)", name)
    return (found["after"], int(found["number"])) if found else (name, -1)


def grid(cells: Sequence[tuple[str, Figure]], title: str) -> Markup:
    """A grid of layers as squares: one row per kind of layer, one column per block; darker means larger.

    Args:
        cells: one value per layer, not empty.
        title: description of the values, used as the accessible name.

    Returns:
        The SVG element as markup.
    """
    placed = [(*_layer_place(name), name, figure) for name, figure in cells]
    rows = list(dict.fromkeys(row for row, *_ in placed))
    columns = max(max(column for _, column, *_ in placed) + 1, 1)
    width = min((_WIDTH - _LABELS - 4) / columns, _CELL * 1.6)
    finite = [figure.value for _, figure in cells if figure.value == figure.value]
    largest = max((abs(value) for value in finite), default=0.0)
    height = len(rows) * _CELL + 20
    parts = [_cell(rows.index(row), max(column, 0), width, name, found, largest) for row, column, name, found in placed]
    for i, row in enumerate(rows):
        parts.append(_text(_LABELS - 6, i * _CELL + 12, "end", row if len(row) <= 20 else "…" + row[-19:]))
    for i in range(0, columns, max(1, columns // 6)):
        parts.append(_text(round(_LABELS + (i + 0.5) * width, 1), height - 4, "middle", i))
    return Markup('<svg class="chart grid" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, height, title, Markup("").join(parts)
    )


def _cell(row: int, column: int, width: float, name: str, figure: Figure, largest: float) -> Markup:
    share = abs(figure.value) / largest if largest else 0.0
    return Markup(
        '<rect x="{}" y="{}" width="{}" height="{}" fill-opacity="{}" data-source="{}" data-value="{}">'
        "<title>{}: {}</title></rect>"
    ).format(
        round(_LABELS + column * width, 2), row * _CELL + 1, round(width - 1.5, 2), _CELL - 2,
        round(0.04 + 0.96 * share, 3), figure.source, repr(figure.value), name, shown(figure.value, figure.form),
    )  # fmt: skip


def _text(x: float, y: float, anchor: str, words: object) -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(x, y, anchor, words)
