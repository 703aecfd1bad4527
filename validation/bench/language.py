"""Speed and size of a language export in vLLM, as a client of its OpenAI API sees it."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import median

from safetensors import safe_open

from exporters.vllm.environment import find_vllm_python, inspect_environment
from exporters.vllm.target import KIND
from fp8pipe.artifact import Artifact, open_artifact
from fp8pipe.core.errors import Fp8PipeError
from validation.bench.config import BenchConfig
from validation.bench.record import Figure, MeasureRecord, write_measure
from validation.vllm.launcher import ServerOptions, server

__all__ = ["bench_language"]

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
    artifact = open_artifact(export, kind=KIND)
    environment = inspect_environment(find_vllm_python(vllm_python))
    options = ServerOptions(served_name="export", max_num_seqs=max(8, config.concurrency))
    with server(export, options, vllm_python=vllm_python, verify=False) as url:
        _ask(url, config.tokens)  # what is compiled or cached at the first request is not counted
        alone = [_ask(url, config.tokens) for _ in range(config.rounds)]
        started = time.perf_counter()
        with ThreadPoolExecutor(config.concurrency) as pool:
            together = list(pool.map(lambda _: _ask(url, config.tokens), range(config.concurrency * 2)))
        wall = time.perf_counter() - started
    rows = [*_sizes(artifact), *_speeds(alone, together, wall, config.concurrency)]
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


def _sizes(artifact: Artifact) -> list[Figure]:
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
