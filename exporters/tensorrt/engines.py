"""Engines of an export: where they are stored, their entries in `layers.json`, and checks of their precision and size.

An engine of TensorRT for RTX carries the source text of its generated kernels, some 145 kB each, which is compiled on
the GPU. Most texts are stored once per kernel launch, even if two are identical, so their total size depends on the
number of layers, but neither on the layers' width nor on any setting. So two sizes are compared with the total size of
the codes, scales and floats that an engine must hold: the size of the engine without that text, which would double if
the builder kept weights dequantized, and the size of the compressed file as it is stored.
"""

from __future__ import annotations

import json
import mmap
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from exporters.tensorrt.builder import Built
from exporters.tensorrt.listing import PrecisionReport
from exporters.tensorrt.target import Builder, EngineSize
from fp8pipe.artifact import Gate, at_most

ENGINES: Final = "engines"
LAYERS_FILE: Final = "layers.json"


def engine_file(capability: str, builder: Builder = Builder.RTX) -> str:
    """Path of an engine within an export: `engines/rtx-8.9.engine`; `.xz` is added when it is compressed."""
    return f"{ENGINES}/{'rtx' if builder is Builder.RTX else 'trt'}-{capability}.engine"


def describe_engine(root: Path, name: str, report: PrecisionReport, built: Built) -> dict[str, Any]:
    """Make an engine's entry in layers.json.

    Args:
        root: directory of the export.
        name: path of the engine file within it.
        report: the engine's precisions.
        built: the result of the build.
    """
    return {
        "engine": name,
        "engine_bytes": (root / name).stat().st_size,
        "precisions": report.counts(),
        "products": [product.model_dump() for product in report.products],
        "other_layers": report.other_layers,
        "builder_warnings": list(built.warnings),
        "layers": [layer.model_dump() for layer in built.layers],
    }


def write_layers(root: Path, reports: Mapping[str, Mapping[str, Any]]) -> None:
    """Write layers.json, with entries by compute capability; no file if there is no engine."""
    if reports:
        (root / LAYERS_FILE).write_text(json.dumps(reports, indent=1) + "\n", encoding="utf-8")


def precision_gate(report: PrecisionReport, wanted: Mapping[str, str], name: str, *, required: bool) -> Gate:
    """Gate on the number of matrix multiplications in another precision than wanted; always passes if not `required`.

    `wanted` are precisions by name of the graph's node, as returned by `artifact_precisions`.
    """
    other, kinds = report.not_in(wanted), Counter(wanted.values())
    detail = shown_counts(report.counts())
    if len(kinds) > 1:
        detail += f"; in the artifact {shown_counts(kinds)}"
    detail += f"; the first: {other[0]}" if other else ""
    return at_most(name, len(other), 0 if required else len(other), detail)


def shown_counts(counts: Mapping[str, int]) -> str:
    """Counts by precision, as text."""
    return ", ".join(f"{count} in {name}" for name, count in sorted(counts.items()))


# Largest ratio of an engine's size, without text, to that of the graph's tensors; FP16 copies of 8-bit codes give 2.
LIMIT: Final = 1.35
# An engine also has a header and a record per layer: together 57 kB with two transformer blocks, 210 kB with twelve.
ALLOWANCE_BYTES: Final = 256 * 1024
_MEGABYTE: Final = 1_000_000
# Text is found as runs of at least this length: random weights contain such a run with a probability of 1 in 10^800.
# The E4M3 scales of NVFP4 blocks can consist of these bytes, too, but contain no line feed: as an E4M3 scale, that byte
# is 2^-6 of the typical ones.
_TEXT: Final = re.compile(rb"[\t\n\r\x20-\x7e]{2000,}")

# For dry runs: kernel source text per transformer block (0.9 to 1.2 MB with 6, 12 and 30 blocks), and the compression
# ratio of xz on codes (0.83 to 0.95; 0.53 to 0.56 if each byte holds one 4-bit code).
_BLOCK_TEXT_BYTES: Final = 1_000_000
_PACKED, _PACKED_HALVES = 0.9, 0.55


def expected_sizes(graph_bytes: int, blocks: int, engines: int, *, pack: bool, halves: bool) -> tuple[int, int]:
    """Size in bytes of an export with its engines: the peak during the export, and the final size.

    `graph_bytes` is the size of the graph with its weights, `blocks` the number of transformer blocks. While an engine
    is being compressed, both files exist; `halves` says that 4-bit codes are stored one per byte.
    """
    if not engines:
        return graph_bytes, graph_bytes
    plain = graph_bytes + blocks * _BLOCK_TEXT_BYTES
    if not pack:
        return graph_bytes + engines * plain, graph_bytes + engines * plain
    packed = int(graph_bytes * (_PACKED_HALVES if halves else _PACKED))
    return graph_bytes + engines * packed + plain, graph_bytes + engines * packed


def measure_engine(engine: Path, ideal: int) -> EngineSize:
    """Measure a non-empty engine file against `ideal`, the `stored_bytes` of its graph."""
    with engine.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        runs = (match.group() for match in _TEXT.finditer(content))
        text = sum(len(run) for run in runs if b"\n" in run)
        return EngineSize(engine_bytes=len(content), text_bytes=text, ideal_bytes=ideal)


def size_gate(size: EngineSize, capability: str, *, required: bool) -> Gate:
    """Gate on the engine's size without text: it must not exceed the graph's tensors by more than codes allow.

    Always passes if not `required`, as for weight-only formats, where the builder may keep weights dequantized.
    """
    shown = f"codes, scales and floats have {size.ideal_bytes / _MEGABYTE:.1f}: x{size.weights_over_ideal:.2f}"
    name, detail = f"MB of the engine beside text for {capability}", f"of {size.engine_bytes / _MEGABYTE:.1f}; {shown}"
    return _bytes_gate(name, size.engine_bytes - size.text_bytes, size, required, detail)


def stored_gate(size: EngineSize, stored_bytes: int, capability: str, *, required: bool) -> Gate:
    """Gate on the size of the engine file as stored in the export, against the size of the graph's tensors.

    Always passes if not `required`, as for uncompressed engines and for weight-only formats.
    """
    detail = f"x{stored_bytes / size.ideal_bytes:.2f} of codes, scales and floats"
    return _bytes_gate(f"MB of the stored engine for {capability}", stored_bytes, size, required, detail)


def _bytes_gate(name: str, found: int, size: EngineSize, required: bool, detail: str) -> Gate:
    value, limit = found / _MEGABYTE, (LIMIT * size.ideal_bytes + ALLOWANCE_BYTES) / _MEGABYTE
    return at_most(name, value, limit if required else max(value, limit), detail)
