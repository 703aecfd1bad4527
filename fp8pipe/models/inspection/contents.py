"""Data classes for the result of an inspection: layers, histograms of scales, and facts from the other files."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_FEW_BINS = 40


@dataclass(slots=True)
class ScaleBins:
    """Histogram of scales, with one bin per power of two.

    Attributes:
        bins: number of scales for each value of floor(log2(scale)).
        bad: number of scales that are zero, negative, infinite or NaN.
    """

    bins: Counter[int] = field(default_factory=Counter)
    bad: int = 0

    def add(self, scales: np.ndarray) -> None:
        """Add scales to the histogram; an array of any shape and floating-point type."""
        values = scales.astype(np.float64).reshape(-1)
        good = np.isfinite(values) & (values > 0)
        self.bad += int((~good).sum())
        # frexp is exact, whereas log2 rounds. Its mantissa is in [0.5, 1), hence the -1: 1 = 0.5 * 2^1 is in bin 0.
        exponents, counts = np.unique(np.frexp(values[good])[1] - 1, return_counts=True)
        self.bins.update(dict(zip(exponents.tolist(), counts.tolist(), strict=True)))

    @property
    def count(self) -> int:
        """Total number of scales, including bad ones."""
        return sum(self.bins.values()) + self.bad

    def to_json(self) -> dict[str, Any]:
        """The histogram as JSON-compatible data."""
        return {"log2_bins": dict(sorted(self.bins.items())), "bad": self.bad}

    def bars(self, width: int = 40) -> list[str]:
        """The histogram as text, one line per bin in ascending order.

        Args:
            width: length of the bar of the largest bin, in characters; other bars are proportional to it.
        """
        if not self.bins:
            return []
        most = max(self.bins.values())
        low, high = min(self.bins), max(self.bins)
        places = range(low, high + 1) if high - low < _FEW_BINS else sorted(self.bins)
        lengths = {place: max(1, round(width * count / most)) for place, count in self.bins.items() if count}
        return [f"2^{place:<4} {self.bins.get(place, 0):>10,} {'#' * lengths.get(place, 0)}" for place in places]


@dataclass(slots=True)
class LayerView:
    """Inspection result for one weight.

    Attributes:
        name: name of the layer, without `.weight`.
        format: storage format, for instance "fp8-e4m3", "int8", "int4-packed", "bf16".
        shape: logical (unpacked) shape of the weight; None if unknown.
        size_bytes: size of codes, scales and zero points together.
        granularity: granularity of the scales; empty for floating-point weights.
        codes: number of codes inspected; 0 if only headers were read.
        saturated: number of codes that are the smallest or largest of their format.
        nan: number of codes that are NaN.
        scales: histogram of the weight's scales.
    """

    name: str
    format: str
    shape: tuple[int, ...] | None
    size_bytes: int
    granularity: str = ""
    codes: int = 0
    saturated: int = 0
    nan: int = 0
    scales: ScaleBins = field(default_factory=ScaleBins)

    def add_codes(self, codes: int, saturated: int, nan: int) -> None:
        """Add counts for a further part of the weight: all codes, saturated codes and NaN codes."""
        self.codes, self.saturated, self.nan = self.codes + codes, self.saturated + saturated, self.nan + nan

    def to_json(self) -> dict[str, Any]:
        """The layer as JSON-compatible data."""
        share = self.saturated / self.codes if self.codes else None
        return {
            "name": self.name, "format": self.format, "shape": self.shape, "size_bytes": self.size_bytes,
            "granularity": self.granularity, "codes": self.codes, "saturated": share, "nan_codes": self.nan,
            "scales": self.scales.to_json(),
        }  # fmt: skip


@dataclass(slots=True)
class Contents:
    """Inspection result for a whole checkpoint.

    Attributes:
        form: description of the checkpoint's format, for instance "compressed-tensors (float-quantized)".
        layers: the weights, in file order.
        facts: other properties by name, for instance tokenizer, chat template, preprocessing, inputs and outputs.
        notes: messages for the user, such as inconsistencies and parts that could not be read.
    """

    form: str
    layers: list[LayerView] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def by_format(self) -> list[tuple[str, str, int, int, int, int]]:
        """The layers grouped by format and granularity, largest group (in bytes) first.

        Returns:
            Tuples of format, granularity, number of layers, bytes, number of codes, number of saturated codes.
        """
        groups: dict[tuple[str, str], list[LayerView]] = {}
        for layer in self.layers:
            groups.setdefault((layer.format, layer.granularity), []).append(layer)
        rows = [
            (*key, len(found), *(sum(getattr(x, what) for x in found) for what in ("size_bytes", "codes", "saturated")))
            for key, found in groups.items()
        ]
        return sorted(rows, key=lambda row: -row[3])

    def scales(self) -> ScaleBins:
        """The histogram of all scales in the checkpoint."""
        bins = sum((layer.scales.bins for layer in self.layers), Counter[int]())
        return ScaleBins(bins, sum(layer.scales.bad for layer in self.layers))

    def to_json(self) -> dict[str, Any]:
        """The contents as JSON-compatible data."""
        names = ("format", "granularity", "layers", "size_bytes", "codes", "saturated_codes")
        return {
            "form": self.form,
            "formats": [dict(zip(names, row, strict=True)) for row in self.by_format()],
            "scales": self.scales().to_json(),
            "facts": self.facts,
            "layers": [layer.to_json() for layer in self.layers],
            "notes": self.notes,
        }
