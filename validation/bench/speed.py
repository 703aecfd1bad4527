"""`bench`: speed and size of an export, in ONNX Runtime for vision models and in vLLM for language models.

The baseline of a vision export is the same graph in floating point: without quantizers, with dequantized weights and
otherwise the same operators. Calls of both graphs alternate, so that other load on the machine affects both equally,
and ratios are computed within a round. vLLM is measured by a client of its OpenAI API.
"""

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

from exporters.devices import CUDA_PROVIDER, in_onnxruntime
from exporters.graph.formats import MODEL_FILE
from exporters.graph.runtime import open_session
from exporters.onnx import target as onnx
from exporters.tensorrt.half import dequantize_graph
from exporters.vllm import target as vllm
from exporters.vllm.environment import find_vllm_python, inspect_environment
from fp8pipe.artifact import Artifact, open_artifact
from fp8pipe.core.errors import Fp8PipeError, MissingCapabilityError
from fp8pipe.core.progress import track
from validation.bench.record import BenchConfig, Figure, MeasureRecord, figure, write_measure
from validation.vllm.launcher import ServerOptions, open_local, server

_PACKAGES = ("onnxruntime", "onnx", "onnx-ir", "numpy")


def bench_vision(export: Path, config: BenchConfig) -> MeasureRecord:
    """Measure an ONNX export and write `<export>.bench.json` next to it.

    Raises:
        BadArtifactError: the export is damaged, or ONNX Runtime rejects it.
        MissingCapabilityError: onnxruntime is not installed, or cannot use the selected GPU.
    """
    import onnx_ir as ir

    config = config.model_copy(update={"device": in_onnxruntime(config.device, "bench").name})
    artifact = open_artifact(export, kind=onnx.KIND)
    graph = artifact.root / MODEL_FILE
    with tempfile.TemporaryDirectory(prefix="fp8pipe-bench-") as folder:
        plain = Path(folder) / MODEL_FILE
        model = ir.load(graph)
        dequantize_graph(model)
        ir.save(model, plain)
        rows = _sizes("graph", graph.stat().st_size, "floating point", plain.stat().st_size, "float",
                      compared="graph and weights")  # fmt: skip
        sessions = {"export": _session(graph, config), "float": _session(plain, config)}
    shape = tuple(map(int, artifact.manifest.details_of(onnx.OnnxDetails).input.shape[1:]))
    with track(len(config.batches) * config.rounds, "bench") as progress:
        for batch in config.batches:
            pixels = np.random.default_rng(0).standard_normal((batch, *shape), dtype=np.float32)
            times = _interleaved(sessions, pixels, config.rounds, progress)
            rows += _latencies(times, batch)
    return write_measure(artifact, "bench", config, rows, packages=_PACKAGES)


def _session(graph: Path, config: BenchConfig) -> Any:
    if config.device == "cpu":
        return open_session(graph, threads=config.threads)
    session = open_session(graph, threads=config.threads, providers=(CUDA_PROVIDER, "CPUExecutionProvider"))
    if session.get_providers()[0] != CUDA_PROVIDER:  # ONNX Runtime falls back to the CPU if a CUDA library is missing
        raise MissingCapabilityError(
            f"{CUDA_PROVIDER} cannot be used", why="ONNX Runtime could not load it; see its own message above",
            fix="install the CUDA and cuDNN that this onnxruntime-gpu is built for, or give --device cpu",
        )  # fmt: skip
    return session


def _interleaved(sessions: Mapping[str, Any], pixels: Any, rounds: int, progress: Any) -> dict[str, list[float]]:
    """Run the sessions alternately, after one warm-up call each.

    Args:
        sessions: ONNX Runtime sessions by name.
        pixels: the input, (N, 3, H, W) float32.
        rounds: measured calls per session.
        progress: advanced after each round.

    Returns:
        The time of every call in milliseconds, by session name.
    """
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
    how = f"median of {len(times['export'])} calls, alternating between the graphs"
    within = "median of the ratios within a round"
    at = f"{batch} image{'s' if batch > 1 else ''} at once"
    return [
        figure(f"latency, {at}", f"latency_ms_batch_{batch}", quantized, "ms", how),
        figure(f"latency in floating point, {at}", f"float_latency_ms_batch_{batch}", plain, "ms", how),
        figure(f"throughput, {at}", f"images_per_s_batch_{batch}", 1000 * batch / quantized, "images/s", how),
        figure(f"speed-up over floating point, {at}", f"speedup_batch_{batch}", ratio, "x", within),
    ]


_PROMPT = "Write a long story about a lighthouse keeper and the sea."
_NO_COMPARISON = "speed-up over full precision: on a CPU vLLM computes FP8 weights in bf16, so there is none to measure"
_SCALE_ENDINGS = ("_scale", "_scale_inv")


@dataclass(frozen=True, slots=True)
class _Answer:
    first_s: float
    whole_s: float
    tokens: int


def bench_language(export: Path, config: BenchConfig, *, vllm_python: str | None = None) -> MeasureRecord:
    """Measure a vLLM export and write `<export>.bench.json` next to it.

    Raises:
        BadArtifactError: the export is damaged, or vLLM cannot load it.
        MissingCapabilityError: vLLM is not installed.
        Fp8PipeError: the server does not respond.
    """
    artifact = open_artifact(export, kind=vllm.KIND)
    environment = inspect_environment(find_vllm_python(vllm_python))
    options = ServerOptions(served_name="export", max_num_seqs=max(8, config.concurrency))
    with server(export, options, vllm_python=vllm_python, verify=False) as url:
        _ask(url, config.tokens)  # warm-up: the first request may compile or fill caches
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
    kind = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), kind)
    started, first, counted = time.perf_counter(), 0.0, 0
    with open_local(request, timeout_s=600) as reply:
        for event in _events(reply):
            first = first or time.perf_counter() - started
            counted = (event.get("usage") or {}).get("completion_tokens", counted)
    if not counted:
        raise Fp8PipeError(
            "vLLM's server generated no tokens",
            why="the stream ended without a token count",
            fix="see the server's log",
        )
    return _Answer(first, time.perf_counter() - started, counted)


def _events(lines: Iterator[bytes]) -> Iterator[dict[str, dict[str, int]]]:
    for line in lines:
        data = line.removeprefix(b"data: ").strip()
        if line.startswith(b"data: ") and data != b"[DONE]":
            yield json.loads(data)


def _speeds(alone: Sequence[_Answer], together: Sequence[_Answer], wall: float, concurrency: int) -> list[Figure]:
    single = f"median of {len(alone)} requests, one at a time"
    first = 1000 * median(answer.first_s for answer in alone)
    speed = median((answer.tokens - 1) / (answer.whole_s - answer.first_s) for answer in alone)
    throughput, many = sum(answer.tokens for answer in together) / wall, f"{concurrency} requests at once"
    name = f"tokens_per_s_{concurrency}_at_once"
    return [
        figure("time to the first token", "first_token_ms", first, "ms", single),
        figure("speed of one answer", "tokens_per_s_1", speed, "tokens/s", f"{single}; after the first token"),
        figure(f"throughput, {many}", name, throughput, "tokens/s", f"{len(together)} requests"),
    ]


def _sizes(
    what: str, size: int, plain: str, plain_size: int, share: str, *, counted: str = "", compared: str = ""
) -> list[Figure]:
    return [
        figure(f"size of the {what}", "size_bytes", size, "bytes"),
        figure(f"size in {plain}", "float_size_bytes", plain_size, "bytes", counted),
        figure(f"share of the {share} size", "size_ratio", size / plain_size, "", compared),
    ]


def _weight_sizes(artifact: Artifact) -> list[Figure]:
    stored, elements = 0, 0
    for entry in artifact.manifest.files:
        if entry.path.endswith(".safetensors"):
            stored += entry.size
            with safe_open(artifact.root / entry.path, framework="numpy") as file:
                shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
            elements += sum(prod(shape) for name, shape in shapes.items() if not name.endswith(_SCALE_ENDINGS))
    return _sizes("weights", stored, "bf16", 2 * elements, "bf16", counted="two bytes an element")
