"""Speed and size of a vision export in ONNX Runtime, beside the same graph in floating point.

The float graph is the export without its quantizers: same operators, same weights dequantized. Both are called in turn,
so that whatever else the machine does disturbs them alike, and ratios are taken within a round.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from exporters.graph.formats import MODEL_FILE
from exporters.graph.runtime import open_session
from exporters.onnx.target import KIND, OnnxDetails
from exporters.tensorrt.half import dequantize_graph
from fp8pipe.artifact import open_artifact
from fp8pipe.core.progress import track
from validation.bench.config import BenchConfig
from validation.bench.record import Figure, MeasureRecord, write_measure

__all__ = ["bench_vision"]

_PACKAGES = ("onnxruntime", "onnx", "onnx-ir", "numpy")


def bench_vision(export: Path, config: BenchConfig) -> MeasureRecord:
    """Measure an export to ONNX and write `<export>.bench.json` beside it.

    Raises:
        BadArtifactError: a damaged export, or one that ONNX Runtime refuses.
        MissingCapabilityError: onnxruntime is not installed.
    """
    import onnx_ir as ir

    artifact = open_artifact(export, kind=KIND)
    graph = artifact.root / MODEL_FILE
    with tempfile.TemporaryDirectory(prefix="fp8pipe-bench-") as folder:
        plain = Path(folder) / MODEL_FILE
        model = ir.load(graph)
        dequantize_graph(model)
        ir.save(model, plain)
        sizes = {"export": graph.stat().st_size, "float": plain.stat().st_size}
        sessions = {
            "export": open_session(graph, threads=config.threads), "float": open_session(plain, threads=config.threads)
        }  # fmt: skip
    shape = tuple(map(int, artifact.manifest.details_of(OnnxDetails).input.shape[1:]))
    rows = _sizes(sizes)
    with track(len(config.batches) * config.rounds, "bench") as progress:
        for batch in config.batches:
            pixels = np.random.default_rng(0).standard_normal((batch, *shape), dtype=np.float32)
            times = _interleaved(sessions, pixels, config.rounds, progress)
            rows += _latencies(times, batch)
    return write_measure(artifact, "bench", config, rows, packages=_PACKAGES)


def _interleaved(sessions: Mapping[str, Any], pixels: Any, rounds: int, progress: Any) -> dict[str, list[float]]:
    """Milliseconds of every call, all sessions in turn; one call each before, which is not counted."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for round_ in range(rounds + 1):
        for name, session in sessions.items():
            started = time.perf_counter()
            session.run(None, {session.get_inputs()[0].name: pixels})
            if round_:
                times[name].append(1000 * (time.perf_counter() - started))
        if round_:
            progress.advance(1)
    return times


def _latencies(times: Mapping[str, Sequence[float]], batch: int) -> list[Figure]:
    quantized, plain = median(times["export"]), median(times["float"])
    ratio = median(f / q for f, q in zip(times["float"], times["export"], strict=True))
    how = f"median of {len(times['export'])} calls, both graphs in turn"
    at = f"{batch} image{'s' if batch > 1 else ''} at once"
    return [
        Figure(what=f"latency, {at}", name=f"latency_ms_batch_{batch}", value=quantized, unit="ms", detail=how),
        Figure(
            what=f"latency in floating point, {at}", name=f"float_latency_ms_batch_{batch}", value=plain, unit="ms",
            detail=how,
        ),
        Figure(
            what=f"throughput, {at}", name=f"images_per_s_batch_{batch}", value=1000 * batch / quantized,
            unit="images/s", detail=how,
        ),
        Figure(
            what=f"speed-up over floating point, {at}", name=f"speedup_batch_{batch}", value=ratio, unit="x",
            detail="median of the ratios within a round",
        ),
    ]  # fmt: skip


def _sizes(sizes: Mapping[str, int]) -> list[Figure]:
    return [
        Figure(what="size of the graph", name="size_bytes", value=sizes["export"], unit="bytes"),
        Figure(what="size in floating point", name="float_size_bytes", value=sizes["float"], unit="bytes"),
        Figure(
            what="share of the float size", name="size_ratio", value=sizes["export"] / sizes["float"], unit="",
            detail="graph and weights",
        ),
    ]  # fmt: skip
