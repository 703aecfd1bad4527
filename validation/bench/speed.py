"""x"""

from __future__ import annotations

import json
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from safetensors import safe_open

from exporters.graph.description import MODEL_FILE
from exporters.graph.runtime import open_session
from exporters.onnx import target as onnx
from exporters.tensorrt.dequantized import dequantize_graph
from exporters.vllm import target as vllm
from exporters.vllm.environment import find_vllm_python, inspect_environment
from fp8pipe.artifact import Artifact, open_artifact
from fp8pipe.core.errors import Fp8PipeError
from fp8pipe.core.progress import track
from validation.bench.record import BenchConfig, Figure, MeasureRecord, write_measure
from validation.vllm.launcher import ServerOptions, server

_PACKAGES = ("onnxruntime", "onnx", "onnx-ir", "numpy")


def bench_vision(export: Path, config: BenchConfig) -> MeasureRecord:
    """Measure an export to ONNX and write `<export>.bench.json` beside it.

    Raises:
        BadArtifactError: a damaged export, or one that ONNX Runtime refuses.
        MissingCapabilityError: onnxruntime is not installed.
    """
    import onnx_ir as ir

    artifact = open_artifact(export, kind=onnx.KIND)
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
    shape = tuple(map(int, artifact.manifest.details_of(onnx.OnnxDetails).input.shape[1:]))
    rows = _graph_sizes(sizes)
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


def _graph_sizes(sizes: Mapping[str, int]) -> list[Figure]:
    return [
        Figure(what="size of the graph", name="size_bytes", value=sizes["export"], unit="bytes"),
        Figure(what="size in floating point", name="float_size_bytes", value=sizes["float"], unit="bytes"),
        Figure(
            what="share of the float size", name="size_ratio", value=sizes["export"] / sizes["float"], unit="",
            detail="graph and weights",
        ),
    ]  # fmt: skip


_PROMPT = "Write a long story about a lighthouse keeper and the sea."
_NO_COMPARISON = "speed against full precision: on a CPU vLLM computes FP8 weights in bf16, so there is none to see"
_SCALE_ENDINGS = ("_scale", "_scale_inv")


@dataclass(frozen=True, slots=True)
class _Answer:
    first_s: float
    whole_s: float
    tokens: int


def bench_language(export: Path, config: BenchConfig, *, vllm_python: str | None = None) -> MeasureRecord:
    """Measure an export to vLLM and write `<export>.bench.json` beside it.

    Raises:
        BadArtifactError: a damaged export, or one that vLLM cannot load.
        MissingCapabilityError: no vLLM.
        Fp8PipeError: the server does not answer.
    """
    artifact = open_artifact(export, kind=vllm.KIND)
    environment = inspect_environment(find_vllm_python(vllm_python))
    options = ServerOptions(served_name="export", max_num_seqs=max(8, config.concurrency))
    with server(export, options, vllm_python=vllm_python, verify=False) as url:
        _ask(url, config.tokens)  # what is compiled or cached at the first request is not counted
        alone = [_ask(url, config.tokens) for _ in range(config.rounds)]
        started = time.perf_counter()
        with ThreadPoolExecutor(config.concurrency) as pool:
            together = list(pool.map(lambda _: _ask(url, config.tokens), range(config.concurrency * 2)))
        wall = time.perf_counter() - started
    rows = [*_weight_sizes(artifact), *_speeds(alone, together, wall, config.concurrency)]
    return write_measure(
        artifact, "bench", config, rows, packages=(), versions=environment.versions,
        not_measured=[_NO_COMPARISON] if environment.plugin else [],
    )  # fmt: skip


def _ask(url: str, tokens: int) -> _Answer:
    body = {
        "model": "export", "prompt": _PROMPT, "max_tokens": tokens, "min_tokens": tokens, "temperature": 0,
        "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    started, first, counted = time.perf_counter(), 0.0, 0
    with opener.open(request, timeout=600) as reply:
        for event in _events(reply):
            first = first or time.perf_counter() - started
            counted = (event.get("usage") or {}).get("completion_tokens", counted)
    if not counted:
        raise Fp8PipeError("vLLM's server gave no tokens", why="the stream ended without a count", fix="see its log")
    return _Answer(first, time.perf_counter() - started, counted)


def _events(lines: Iterator[bytes]) -> Iterator[dict[str, dict[str, int]]]:
    for line in lines:
        data = line.removeprefix(b"data: ").strip()
        if line.startswith(b"data: ") and data != b"[DONE]":
            yield json.loads(data)


def _speeds(alone: Sequence[_Answer], together: Sequence[_Answer], wall: float, concurrency: int) -> list[Figure]:
    single = f"median of {len(alone)} requests, one at a time"
    return [
        Figure(
            what="time to the first token", name="first_token_ms", value=1000 * median(a.first_s for a in alone),
            unit="ms", detail=single,
        ),
        Figure(
            what="speed of one answer", name="tokens_per_s_1",
            value=median((a.tokens - 1) / (a.whole_s - a.first_s) for a in alone), unit="tokens/s",
            detail=f"{single}; after the first token",
        ),
        Figure(
            what=f"throughput, {concurrency} requests at once", name=f"tokens_per_s_{concurrency}_at_once",
            value=sum(a.tokens for a in together) / wall, unit="tokens/s", detail=f"{len(together)} requests",
        ),
    ]  # fmt: skip


def _weight_sizes(artifact: Artifact) -> list[Figure]:
    stored, elements = 0, 0
    for entry in artifact.manifest.files:
        if entry.path.endswith(".safetensors"):
            stored += entry.size
            with safe_open(artifact.root / entry.path, framework="numpy") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            elements += sum(prod(shape) for name, shape in shapes.items() if not name.endswith(_SCALE_ENDINGS))
    return [
        Figure(what="size of the weights", name="size_bytes", value=stored, unit="bytes"),
        Figure(
            what="size in bf16", name="float_size_bytes", value=2 * elements, unit="bytes",
            detail="two bytes an element",
        ),
        Figure(what="share of the bf16 size", name="size_ratio", value=stored / (2 * elements), unit=""),
    ]  # fmt: skip
