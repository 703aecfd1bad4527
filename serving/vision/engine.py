"""The engine behind the server, and the short measurement that chooses its batch sizes and threads.

A batch must not change an answer: integer products do not, but a float product of one row may be computed by another
kernel than one of eight. So each batch size is run once on random pixels when the server starts, and only those whose
rows equal the same images run alone, bit for bit, are used (unless `inexact_batches`). What was found is shown at
/v1/artifact.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from exporters.onnx.packages import import_onnx_package
from exporters.onnx.runtime import open_session
from exporters.vision import MODEL_FILE
from fp8pipe.errors import ConfigurationError, MissingCapabilityError
from serving.http.config import Provider, ServeConfig
from serving.vision.model import ServedModel

__all__ = ["Engine", "Measured", "open_engine"]

logger = logging.getLogger(__name__)

_SIZES: Final = (1, 2, 4, 8, 16, 32, 64)
# Larger batches only make everybody wait longer when they gain less than this.
_WORTHWHILE: Final = 1.03
_LONGEST_BATCH_S: Final = 0.5
_PROVIDERS: Final = {
    Provider.CPU: "CPUExecutionProvider",
    Provider.CUDA: "CUDAExecutionProvider",
    Provider.TENSORRT: "TensorrtExecutionProvider",
}
Run = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, slots=True)
class Measured:
    """One measurement.

    Attributes:
        threads: within an operator; 0 where it does not apply.
        batch: images at once.
        images_per_s: throughput.
        exact: whether every row equals the same image run alone, bit for bit.
    """

    threads: int
    batch: int
    images_per_s: float
    exact: bool


@dataclass(frozen=True, slots=True)
class Engine:
    """A loaded engine.

    Attributes:
        run: (n, 3, H, W) float32 -> (n, C) float32.
        sizes: batch sizes that are used.
        threads: within an operator; 0 where it does not apply.
        provider: where it computes.
        width: C, the number of outputs.
        measured: what the choice was made from.
    """

    run: Run
    sizes: tuple[int, ...]
    threads: int
    provider: str
    width: int
    measured: tuple[Measured, ...]


def open_engine(model: ServedModel, config: ServeConfig) -> Engine:
    """Load the graph, measure, and choose.

    Raises:
        MissingCapabilityError: the provider or the GPU is not here, or cannot be used.
        BadArtifactError: ONNX Runtime refuses the graph.
    """
    if model.artifact.kind == "trt-export":
        from serving.vision.tensorrt import open_tensorrt

        run, provider, sizes = open_tensorrt(model)
        return _chosen({0: run}, model, config, provider, sizes)
    path, cpu = model.artifact.root / MODEL_FILE, _PROVIDERS[Provider.CPU]
    providers = _providers(config.provider)
    if providers[0] != cpu:
        session = open_session(path, threads=config.threads or 1, providers=providers)
        if _in_use(session, providers[0], config.provider):
            runs = {config.threads or 1: _session_run(session, model)}
            return _chosen(runs, model, config, providers[0], _SIZES)
    counts = [config.threads] if config.threads else sorted({_cores(), max(1, _cores() - 1)})
    runs = {n: _session_run(open_session(path, threads=n, providers=[cpu]), model) for n in counts}
    return _chosen(runs, model, config, cpu, _SIZES)


def _in_use(session: Any, asked: str, wanted: Provider) -> bool:
    """Whether the session computes there: ONNX Runtime falls back to the CPU when a library or the GPU is missing."""
    found = str(session.get_providers()[0])
    if found == asked:
        return True
    if wanted is not Provider.AUTO:
        raise MissingCapabilityError(
            f"{asked} cannot be used", why="ONNX Runtime could not load it; its own message is above",
            fix="install the CUDA and cuDNN that this onnxruntime-gpu is built for, or give --provider cpu",
        )  # fmt: skip
    logger.warning("%s cannot be used, so %s computes", asked, found)
    return False


def _providers(wanted: Provider) -> list[str]:
    available = import_onnx_package("onnxruntime").get_available_providers()
    cpu = _PROVIDERS[Provider.CPU]
    if wanted is Provider.AUTO:
        # TensorRT builds for minutes at the first request of a shape: only by name.
        return [name for name in (_PROVIDERS[Provider.CUDA], cpu) if name in available]
    name = _PROVIDERS[wanted]
    if name not in available:
        raise MissingCapabilityError(
            f"this onnxruntime has no {name}", why=f"it has {', '.join(available)}",
            fix="install onnxruntime-gpu on a machine with an NVIDIA GPU, or give --provider cpu",
        )  # fmt: skip
    return [name] if name == cpu else [name, cpu]


def _session_run(session: Any, model: ServedModel) -> Run:
    source, result = model.input_name, [model.output_name]
    return lambda pixels: session.run(result, {source: pixels})[0]


def _chosen(
    runs: dict[int, Run], model: ServedModel, config: ServeConfig, provider: str, possible: tuple[int, ...]
) -> Engine:
    largest = config.max_batch or possible[-1]
    if largest > possible[-1] and 0 in runs:
        raise ConfigurationError(
            f"batches of {largest} do not fit the engine", why=f"its profile ends at {possible[-1]}", fix="give less"
        )
    sizes = sorted({size for size in possible if size <= largest} | ({config.max_batch} if config.max_batch else set()))
    measured: list[Measured] = []
    for threads, run in runs.items():
        measured += _measure(run, threads, sizes, model, fixed=config.max_batch is not None)
    usable = [m for m in measured if m.exact or config.inexact_batches]
    best = max(m.images_per_s for m in usable)
    if config.max_batch:
        chosen = max(usable, key=lambda m: (m.batch, m.images_per_s))
    else:
        chosen = next(m for m in sorted(usable, key=lambda m: m.batch) if m.images_per_s * _WORTHWHILE >= best)
    allowed = tuple(m.batch for m in usable if m.threads == chosen.threads and m.batch <= chosen.batch)
    refused = [m.batch for m in measured if m.threads == chosen.threads and not m.exact]
    if refused:
        said = "used all the same" if config.inexact_batches else "not used"
        logger.warning("batches of %s differ in bits from images run alone: %s", refused, said)
    run = runs[chosen.threads]
    width = run(np.zeros((1, *model.shape), np.float32)).shape[1]
    return Engine(run, allowed, chosen.threads, provider, width, tuple(measured))


def _measure(run: Run, threads: int, sizes: list[int], model: ServedModel, *, fixed: bool) -> list[Measured]:
    """Each size twice, the faster counts; sizes that take too long end it, unless a size was asked for."""
    pixels = np.random.default_rng(0).standard_normal((sizes[-1], *model.shape), dtype=np.float32)
    run(pixels[:1])  # the first run allocates
    alone: list[np.ndarray] = []
    found = []
    for size in sizes:
        alone += [run(pixels[row : row + 1])[0] for row in range(len(alone), size)]
        took = []
        for _ in range(2):
            started = time.perf_counter()
            outputs = run(pixels[:size])
            took.append(time.perf_counter() - started)
        exact = bool(np.array_equal(outputs, np.stack(alone)))
        found.append(Measured(threads, size, size / min(took), exact))
        if not fixed and min(took) * 2 > _LONGEST_BATCH_S:
            break
    return found


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
