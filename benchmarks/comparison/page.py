"""The Markdown page and the charts of a benchmark."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from comparison.results import Benchmark, Metric, Result, Row

_TOP = """# Benchmark

{command} at {date}{commit}, in {duration}

Processor: {processor}, {cores} cores ({features}), {memory:.0f} GiB of memory. {versions}. In the minute before the
start, {load:.1f} processes were busy on average.{quick}

In every round all contenders take their turn, each in a process of its own. Figures are medians over the rounds.
*Times* columns say how many times better the first row of a table (**bold**) is than the row: the median of the ratios
within a round, with the smallest and the largest of them in brackets. More than 1 means that the first row is better.
"""
_QUICK = " **Quick sizes: they test the benchmark itself, and its figures mean nothing.**"


def write_page(found: Benchmark, folder: Path) -> Path:
    """Write `benchmark.md`, and a chart for each figure that has ratios.

    Args:
        found: the results.
        folder: an existing directory.

    Returns:
        The page.
    """
    parts = [_top(found)]
    for result in found.results:
        charts = [] if result.failure else [draw_chart(result, metric, folder) for metric in _compared(result)]
        parts.append("\n\n".join([render(result), *(f"![{path.stem}]({path.name})" for path in charts if path)]))
    page = folder / "benchmark.md"
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def _top(found: Benchmark) -> str:
    machine = found.machine
    features = machine["features"]
    return _TOP.format(
        command=f"`{found.command}`", date=found.date, commit=f", commit {found.commit}" if found.commit else "",
        duration=_duration(sum(result.seconds for result in found.results)), processor=machine["processor"],
        cores=machine["cores"], features=", ".join(features) if isinstance(features, list) else features,
        memory=int(str(machine["memory_bytes"])) / (1 << 30), versions=_versions(found.versions), load=found.load,
        quick=_QUICK if found.quick else "",
    ).strip()  # fmt: skip


def render(result: Result) -> str:
    """One comparison: heading, what is compared, the table, what could not be measured, and targets."""
    heading = f"## {result.title}\n\n`--only {result.name}`"
    if result.failure:
        return f"{heading}\n\nNot measured: {_cell(result.failure)}"
    rounds = f"{result.rounds} round{'s' if result.rounds > 1 else ''}"
    parts = [f"{heading}, {rounds}, {_duration(result.seconds)}", result.about, _table(result)]
    failed = [row for row in result.rows if row.failure]
    if failed:
        parts.append("\n".join(["Not measured:", "", *(f"* {row.name}: {_cell(row.failure)}" for row in failed)]))
    if result.targets:
        parts.append("\n".join(["Targets:", "", *_targets(result)]))
    return "\n\n".join(parts)


def _table(result: Result) -> str:
    compared = _compared(result)
    heads = ["", *(metric.label for metric in result.metrics), *(f"times: {metric.label}" for metric in compared)]
    lines = ["| " + " | ".join([*heads, "versions"]) + " |", "|---" * (len(heads) + 1) + "|"]
    rows = sorted(result.rows, key=lambda row: row.name != result.baseline)
    for row in rows:
        name = f"**{row.name}**" if row.name == result.baseline else row.name
        cells = [_figure(row, metric) for metric in result.metrics] + [_ratio(row, metric) for metric in compared]
        lines.append("| " + " | ".join([name, *cells, _versions(row.versions)]) + " |")
    return "\n".join(lines)


def _figure(row: Row, metric: Metric) -> str:
    if row.failure:
        return "not measured"
    value = row.medians.get(metric.name)
    return "" if value is None else _number(value)


def _ratio(row: Row, metric: Metric) -> str:
    found = row.ratios.get(metric.name)
    return "" if found is None else f"{found.median:.2f} ({found.low:.2f} to {found.high:.2f})"


def _targets(result: Result) -> list[str]:
    labels = {metric.name: metric.label for metric in result.metrics}
    found = []
    for target in result.targets:
        what = f"{labels[target.metric]}, {target.at_least:g} times better than {target.contender}"
        if target.reached is None:
            found.append(f"* {what}: not measured")
        else:
            verdict = "reached" if target.reached >= target.at_least else "missed"
            found.append(f"* {what}: {verdict}, {target.reached:.2f} times")
    return found


def _compared(result: Result) -> list[Metric]:
    return [metric for metric in result.metrics if any(metric.name in row.ratios for row in result.rows)]


def draw_chart(result: Result, metric: Metric, folder: Path) -> Path | None:
    """Draw one figure of all contenders as bars, from the smallest to the largest round, as SVG.

    Args:
        result: the comparison.
        metric: the figure.
        folder: where the file is written.

    Returns:
        The file; None if no contender has the figure.
    """
    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "benchmark"  # the same identifiers in every run
    from matplotlib.figure import Figure

    rows = [row for row in result.rows if metric.name in row.medians]
    if not rows:
        return None
    figure = Figure(figsize=(7, 0.6 + 0.32 * len(rows)), layout="constrained")
    axes = figure.subplots()
    middles = [row.medians[metric.name] for row in rows]
    ends = [row.samples[metric.name] for row in rows]
    errors = [[m - min(e) for m, e in zip(middles, ends, strict=True)],
              [max(e) - m for m, e in zip(middles, ends, strict=True)]]  # fmt: skip
    colours = ["#1f6feb" if row.ours else "#8c959f" for row in rows]
    axes.barh([row.name for row in rows], middles, xerr=errors, color=colours, ecolor="#24292f")
    axes.invert_yaxis()
    axes.set_xlabel(f"{metric.label} ({metric.better} is better)")
    path = folder / f"{result.name}-{metric.name}.svg"
    figure.savefig(path, metadata={"Date": None})
    return path


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _cell(text: str) -> str:
    """Text that cannot end a cell or begin markup."""
    return " ".join(text.replace("|", "/").replace("`", "'").split())


def names(results: Sequence[Result]) -> list[str]:
    """Names of the comparisons that are broken, for the exit code."""
    return [result.name for result in results if result.broken]
