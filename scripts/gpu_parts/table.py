"""A record as Markdown: one table per part, followed by a list of the rows that failed or were skipped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

Row = Mapping[str, Any]
_Column = tuple[str, Callable[[Row], Any]]


def _number(key: str, factor: float = 1.0, digits: int = 4) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        value = row.get(key)
        return "" if value is None else f"{value * factor:.{digits}g}"

    return show


def _verdict(row: Row) -> str:
    return {True: "yes", False: "**no**"}.get(row.get("passed"), "")


_CORRECT: Final[tuple[_Column, ...]] = (
    ("as on a CPU", _verdict),
    ("codes differing", lambda row: row.get("differing", row.get("exact_differing", ""))),
    ("of", lambda row: row.get("of", "")),
    ("error, of its bound", _number("of_bound", digits=2)),
    ("rms error, y / dx / dB", lambda row: " / ".join(filter(None, (_number(k, digits=2)(row) for k in _RMS)))),
    ("loss curves differ, nats", _number("loss_difference", digits=2)),
    ("codes changed", _number("codes_changed", digits=3)),
    ("changes agreeing", _number("changes_agreeing", digits=3)),
)
_RMS: Final = ("y_rms", "dx_rms", "db_rms")
_STEPS: Final[tuple[_Column, ...]] = (
    ("ms a step", _number("seconds", 1e3)),
    ("host, ms", _number("host_seconds", 1e3)),
    ("tokens/s", _number("tokens_per_second")),
    ("peak, GB", _number("peak_bytes", 1e-9, 3)),
    ("syncs", lambda row: row.get("syncs", "")),
    ("estimated, ms", _number("estimated_step_seconds", 1e3)),
    ("measured / estimated", _number("seconds_over_estimate", digits=3)),
    ("memory / estimated", _number("memory_over_estimate", digits=3)),
    ("by", lambda row: row.get("method", "")),
)
_KERNELS: Final[tuple[_Column, ...]] = (
    ("µs", _number("seconds", 1e6)),
    ("TFLOP/s", _number("tflop_per_second")),
    ("GB/s", _number("gb_per_second")),
    ("of the data sheet", _number("of_data_sheet", digits=2)),
    ("host, µs", _number("host_seconds", 1e6, 3)),
    ("codes agree", _verdict),
)
_VISION: Final[tuple[_Column, ...]] = (
    ("ms a step", _number("seconds", 1e3)),
    ("images a step", lambda row: row.get("images", "")),
    ("seconds per image", _number("seconds_per_image", digits=3)),
    ("peak, GB", _number("peak_bytes", 1e-9, 3)),
)
_PARTS: Final = {"correctness": _CORRECT, "steps": _STEPS, "kernels": _KERNELS, "vision": _VISION}
_PLAIN: Final = ("name", "took")


def table(record: Mapping[str, Any]) -> str:
    """Format a record as Markdown, without a trailing newline."""
    options = record["options"]
    shapes = ", tiny shapes" if options.get("tiny") else ""
    lines = [f"Measured on {options.get('device')}{shapes}, begun {record['began']}."]
    for name, part in record["parts"].items():
        error = f": {part['error']}" if part.get("error") else ""
        lines += ["", f"## {name}", "", f"{part['status']} after {part.get('seconds', '?')} s{error}", ""]
        measured = [row for row in part["rows"] if not {"error", "left_out", "kernels"} & row.keys()]
        lines += _facts(measured) if name not in _PARTS else _table(measured, _PARTS[name])
        lines += [line for row in part["rows"] if "kernels" in row for line in _profile(row)]
        lines += _unmeasured(part["rows"])
    return "\n".join(lines).rstrip()


def _facts(rows: list[Row]) -> list[str]:
    return [
        f"* {row['name']}: " + ", ".join(f"{key} {_plain(value)}" for key, value in row.items() if key not in _PLAIN)
        for row in rows
    ]


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(rows: list[Row], columns: tuple[_Column, ...]) -> list[str]:
    """A Markdown table of the rows; columns that are empty in all rows are omitted."""
    if not rows:
        return []
    shown = [(title, [str(find(row)) for row in rows]) for title, find in columns]
    shown = [(title, cells) for title, cells in shown if any(cell not in ("", "None") for cell in cells)]
    lines = ["| | " + " | ".join(title for title, _ in shown) + " |", "|---" * (len(shown) + 1) + "|"]
    for index, row in enumerate(rows):
        cells = ["" if cells[index] == "None" else cells[index] for _, cells in shown]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return lines


def _profile(row: Row) -> list[str]:
    """A Markdown table of the kernels of a profiled step, slowest first."""
    busy = row["busy_seconds"]
    head = f"{row['name']}: {row['launched']} kernels, busy for {1000 * busy:.4g} ms"
    lines = ["", head, "", "| kernel | calls | ms | share |", "|---|---|---|---|"]
    for one in row["kernels"]:
        name = one["kernel"].replace("|", "\\|")
        share = one["seconds"] / busy if busy else 0.0
        lines.append(f"| `{name}` | {one['calls']} | {1000 * one['seconds']:.3g} | {share:.1%} |")
    return lines


def _unmeasured(rows: list[Row]) -> list[str]:
    found = []
    for row in rows:
        if "error" in row:
            found.append(f"* {row['name']}: **failed**, {row['error']}")
        elif "left_out" in row:
            found.append(f"* {row['name']}: left out, {row['left_out']}")
    return ["", *found] if found else []
