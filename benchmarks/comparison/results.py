"""The results of a benchmark as data: samples, medians, ratios within a round, and the document that holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Literal

from pydantic import Field

from fp8pipe.core.config import FrozenConfig

SCHEMA_VERSION = 1


class Metric(FrozenConfig):
    """A figure that every contender of a comparison has.

    How much better the project is, is the quotient in which more than 1 means that the project is better: for
    `lower`, the contender's figure over the project's, and for `higher` the other way round.
    """

    name: str = Field(description="key in `samples`, `medians` and `ratios`")
    label: str = Field(description="heading in the table")
    better: Literal["lower", "higher", "none"] = Field(description="which figure is better; none: no ratio is formed")


class Spread(FrozenConfig):
    """Ratios within a round, over all rounds."""

    median: float = Field(description="median over the rounds")
    low: float = Field(description="smallest of the rounds")
    high: float = Field(description="largest of the rounds")


class Row(FrozenConfig):
    """One contender of a comparison."""

    name: str = Field(description="name of the contender")
    ours: bool = Field(description="whether it is this project")
    versions: dict[str, str] = Field(description="versions of the distributions that matter, in its environment")
    failure: str = Field(default="", description="why it could not be measured; empty if it was")
    samples: dict[str, list[float]] = Field(default_factory=dict, description="one figure per round, by metric")
    medians: dict[str, float] = Field(default_factory=dict, description="by metric")
    ratios: dict[str, Spread] = Field(default_factory=dict, description="how much better the baseline is, by metric")


class Target(FrozenConfig):
    """A ratio that the project wants to reach. Nothing fails if it does not."""

    contender: str = Field(description="the peer")
    metric: str = Field(description="the figure")
    at_least: float = Field(description="how much better the baseline is meant to be")
    reached: float | None = Field(default=None, description="the measured ratio; None if it was not measured")


class Result(FrozenConfig):
    """One comparison."""

    name: str = Field(description="as --only names it")
    title: str = Field(description="heading")
    about: str = Field(description="what is compared, on what, and what the figures mean")
    baseline: str = Field(description="the contender that the ratios refer to")
    rounds: int = Field(description="rounds that were measured; in each, all contenders take their turn")
    seconds: float = Field(description="duration of the whole comparison, with preparation")
    metrics: list[Metric] = Field(description="the figures")
    rows: list[Row] = Field(description="the contenders")
    targets: list[Target] = Field(default_factory=list, description="ratios to reach")
    failure: str = Field(default="", description="why nothing was measured; empty otherwise")

    @property
    def broken(self) -> bool:
        """Whether the comparison, or a contender of this project, could not be measured."""
        return bool(self.failure) or any(row.ours and row.failure for row in self.rows)


class Benchmark(FrozenConfig):
    """The document that `benchmark.py` writes."""

    schema_version: int = Field(default=SCHEMA_VERSION, description="version of this schema")
    date: str = Field(description="UTC time of the start, ISO 8601")
    command: str = Field(description="the command line")
    quick: bool = Field(description="sizes that only test the benchmark itself")
    commit: str = Field(description="of the working tree, with + if it has changes; empty outside a repository")
    machine: dict[str, str | int | list[str]] = Field(description="processor, its features, cores, memory, system")
    versions: dict[str, str] = Field(description="distributions in the project's environment")
    load: float = Field(description="mean number of busy processes in the minute before the start")
    results: list[Result] = Field(description="the comparisons")


def summarize(rows: Sequence[Row], metrics: Sequence[Metric], baseline: str) -> list[Row]:
    """Add medians, and ratios to the baseline within each round.

    Args:
        rows: the contenders with their samples; in every row sample i is of round i.
        metrics: the figures.
        baseline: name of the row that the others are compared with.

    Returns:
        The rows with medians and ratios. The baseline has no ratios; if it failed, no row has any.
    """
    first = next((row for row in rows if row.name == baseline and not row.failure), None)
    found = []
    for row in rows:
        medians = {name: median(values) for name, values in row.samples.items()} if not row.failure else {}
        compared = first is not None and row is not first and not row.failure
        ratios = {
            metric.name: spread(first.samples[metric.name], row.samples[metric.name], metric.better)
            for metric in metrics
            if compared and metric.better != "none" and metric.name in row.samples and metric.name in first.samples
        }
        found.append(row.model_copy(update={"medians": medians, "ratios": ratios}))
    return found


def spread(ours: Sequence[float], theirs: Sequence[float], better: str) -> Spread:
    """How much better `ours` is than `theirs`, round by round."""
    pairs = zip(ours, theirs, strict=True)
    ratios = [b / a if better == "lower" else a / b for a, b in pairs]
    return Spread(median=median(ratios), low=min(ratios), high=max(ratios))


def reached(targets: Sequence[Target], rows: Sequence[Row]) -> list[Target]:
    """The targets, with the ratios that were measured."""
    by_name: Mapping[str, Row] = {row.name: row for row in rows}
    found = []
    for target in targets:
        ratio = by_name[target.contender].ratios.get(target.metric)
        found.append(target.model_copy(update={"reached": None if ratio is None else ratio.median}))
    return found
