"""Loads a vision model and its engine, and selects batch sizes, streams and threads by a short benchmark at startup.

Running several batches in parallel (each in its own stream, with fewer threads) often has a higher throughput than one
batch with all threads, and shortens the wait in a burst of requests; but a single request takes longer. So of all
configurations whose throughput is within 5% of the best, the one with the lowest batch latency is used.

Batching must not change results. Integer GEMMs are exact, but a float GEMM may use a different kernel for one row than
for eight. So at startup each batch size is run on random pixels, and only sizes whose outputs are bit-identical to
those of the same images run alone are used (unless `inexact_batches` is set). /v1/artifact shows the measurements.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from exporters.graph.formats import CLASSES_FILE, MODEL_FILE, GraphDetails
from exporters.graph.runtime import import_onnx_package, open_session
from fp8pipe.artifact import Artifact, open_artifact
from fp8pipe.artifact.kinds import kind_named
from fp8pipe.core.errors import BadArtifactError, ConfigurationError, MissingCapabilityError
from fp8pipe.models.vision.answers import Activation
from fp8pipe.models.vision.preprocessing import PREPROCESSING_FILE, Preprocessing, read_model_file
from serving.config import Provider, VisionConfig

logger = logging.getLogger(__name__)

_SIZES: Final = (1, 2, 4, 8, 16, 32, 64)
# Larger batches and more streams increase latency, so they must raise the throughput by at least this factor.
_MIN_GAIN: Final = 1.05
_MAX_BATCH_S: Final = 0.5  # seconds; larger batches that would take longer are not measured
_REPEATS: Final = 3  # number of timings per configuration, of which the shortest counts
_PROVIDERS: Final = {
    Provider.CPU: "CPUExecutionProvider",
    Provider.CUDA: "CUDAExecutionProvider",
    Provider.TENSORRT: "TensorrtExecutionProvider",
}
Run = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, slots=True)
class Measured:
    """The measurement of one configuration."""

    threads: int  # intra-op threads; 0 if not applicable
    streams: int  # batches run in parallel
    batch: int  # images per batch
    images_per_s: float  # total throughput of all streams
    exact: bool  # whether every row is bit-identical to the same image run alone

    @property
    def seconds(self) -> float:
        """Time of one batch while all streams are running, seconds."""
        return self.streams * self.batch / self.images_per_s


@dataclass(frozen=True, slots=True)
class Engine:
    """A loaded engine and the selected configuration."""

    runs: tuple[Run, ...]  # (n, 3, H, W) float32 -> (n, C) float32, one per stream; they may run in parallel
    sizes: tuple[int, ...]  # batch sizes in use
    threads: int  # intra-op threads; 0 if not applicable
    provider: str  # execution provider, or TensorRT and its GPU
    width: int  # C, the number of outputs
    measured: tuple[Measured, ...]  # all measurements that the choice is based on


@dataclass(frozen=True, slots=True)
class Layout:
    """A division of the machine into streams and threads."""

    threads: int  # intra-op threads; 0 if not applicable
    streams: int  # batches run in parallel
    open: Callable[[], tuple[Run, ...]]  # creates a run function for each stream


def open_engine(model: ServedModel, config: VisionConfig) -> Engine:
    """Load the graph, run the benchmark, and select a configuration.

    Raises:
        ConfigurationError: `streams` is set for a GPU, or the batch size does not fit the engine.
        MissingCapabilityError: the provider or the GPU is missing or cannot be used.
        BadArtifactError: ONNX Runtime rejects the graph.
    """
    if model.engine == "tensorrt":
        _refuse_streams(config)
        from serving.vision.tensorrt import open_tensorrt

        run, provider, sizes = open_tensorrt(model)
        return _chosen([Layout(0, 1, lambda: (run,))], model, config, provider, sizes)
    path, cpu = model.artifact.root / MODEL_FILE, _PROVIDERS[Provider.CPU]
    providers = _providers(config.wanted)
    if providers[0] != cpu:
        session = open_session(path, threads=config.threads or 1, providers=providers)
        if _in_use(session, providers[0], config.wanted):
            _refuse_streams(config)
            alone = (_session_run(session, model),)
            return _chosen([Layout(config.threads or 1, 1, lambda: alone)], model, config, providers[0], _SIZES)
    return _chosen(list(_layouts(path, model, config)), model, config, cpu, _SIZES)


def _refuse_streams(config: VisionConfig) -> None:
    if config.streams is not None:
        raise ConfigurationError(
            "--streams does not apply here", why="a GPU runs one batch at a time; streams split the cores of a CPU",
            fix="leave it out, or give --device cpu",
        )  # fmt: skip


def _layouts(path: Path, model: ServedModel, config: VisionConfig) -> Iterator[Layout]:
    """The divisions of the CPU to measure, within the configured `threads` and `streams`.

    If neither is set: one stream with all cores, or with all but one, which is left for the event loop; then more
    streams with fewer threads each.
    """
    cores = _cores()
    if config.threads:
        shapes = [(config.threads, config.streams or 1)]
    elif config.streams:
        shapes = [(max(1, cores // config.streams), config.streams)]
    else:
        shapes = [(threads, 1) for threads in sorted({cores, max(1, cores - 1)})]
        shapes += [(cores // streams, streams) for streams in _SIZES[1:] if streams <= cores]
    for threads, streams in shapes:
        yield Layout(threads, streams, functools.partial(_cpu_runs, path, model, threads, streams))


def _cpu_runs(path: Path, model: ServedModel, threads: int, streams: int) -> tuple[Run, ...]:
    """Create a run function for each stream.

    Every stream has its own session, because a session has one thread pool. Sessions with one thread have no pool, so
    all streams share one.
    """
    sessions = [open_session(path, threads=threads) for _ in range(1 if threads == 1 else streams)]
    return tuple(_session_run(sessions[stream % len(sessions)], model) for stream in range(streams))


def _in_use(session: Any, provider: str, wanted: Provider) -> bool:
    """Whether the session uses the provider, as ONNX Runtime falls back to the CPU if a library or the GPU is missing.

    Raises:
        MissingCapabilityError: it does not, and the provider was requested by name.
    """
    found = str(session.get_providers()[0])
    if found == provider:
        return True
    if wanted is not Provider.AUTO:
        raise MissingCapabilityError(
            f"{provider} cannot be used", why="ONNX Runtime could not load it; see its own message above",
            fix="install the CUDA and cuDNN that this onnxruntime-gpu is built for, or give --device cpu",
        )  # fmt: skip
    logger.warning("%s cannot be used; using %s instead", provider, found)
    return False


def _providers(wanted: Provider) -> list[str]:
    # The execution providers to try, in order of preference.
    available = import_onnx_package("onnxruntime").get_available_providers()
    cpu = _PROVIDERS[Provider.CPU]
    if wanted is Provider.AUTO:
        # TensorRT must be requested by name: it takes minutes to build an engine at the first request of each shape.
        return [name for name in (_PROVIDERS[Provider.CUDA], cpu) if name in available]
    name = _PROVIDERS[wanted]
    if name not in available:
        raise MissingCapabilityError(
            f"this onnxruntime has no {name}", why=f"it has {', '.join(available)}",
            fix="install onnxruntime-gpu on a machine with an NVIDIA GPU, or give --device cpu",
        )  # fmt: skip
    return [name] if name == cpu else [name, cpu]


def _session_run(session: Any, model: ServedModel) -> Run:
    source, result = model.input_name, [model.output_name]
    return lambda pixels: session.run(result, {source: pixels})[0]


def _chosen(
    layouts: Sequence[Layout], model: ServedModel, config: VisionConfig, provider: str, possible: tuple[int, ...]
) -> Engine:
    # Measure all layouts and batch sizes, select one layout, and open it with the batch sizes that may be used.
    largest = config.max_batch or possible[-1]
    if largest > possible[-1] and layouts[0].threads == 0:
        raise ConfigurationError(
            f"the engine does not accept batches of {largest}",
            why=f"its profile ends at {possible[-1]}",
            fix="give fewer",
        )
    sizes = sorted({size for size in possible if size <= largest} | ({config.max_batch} if config.max_batch else set()))
    measured: list[Measured] = []
    for layout in layouts:
        measured += _measure(layout, sizes, model, fixed=config.max_batch is not None)
    chosen = _best([m for m in measured if m.exact or config.inexact_batches], fixed=config.max_batch is not None)
    layout = next(one for one in layouts if (one.threads, one.streams) == (chosen.threads, chosen.streams))
    same = [m for m in measured if (m.threads, m.streams) == (chosen.threads, chosen.streams)]
    refused = [m.batch for m in same if not m.exact]
    if refused:
        said = "used anyway, as requested" if config.inexact_batches else "not used"
        logger.warning("outputs of batches of %s are not bit-identical to those of images run alone: %s", refused, said)
    allowed = tuple(m.batch for m in same if (m.exact or config.inexact_batches) and m.batch <= chosen.batch)
    runs = layout.open()
    width = runs[0](np.zeros((1, *model.shape), np.float32)).shape[1]
    return Engine(runs, allowed, chosen.threads, provider, width, tuple(measured))


def _best(usable: Sequence[Measured], *, fixed: bool) -> Measured:
    """Of the configurations with nearly the best throughput, the one with the shortest batch time.

    With `fixed`, only the largest batch size is considered.
    """
    if fixed:
        usable = [m for m in usable if m.batch == max(one.batch for one in usable)]
    best = max(m.images_per_s for m in usable)
    return min((m for m in usable if m.images_per_s * _MIN_GAIN >= best), key=lambda m: m.seconds)


def _measure(layout: Layout, sizes: list[int], model: ServedModel, *, fixed: bool) -> list[Measured]:
    """Measure each batch size: the shortest of several timings, and whether the outputs are exact.

    Stops when the next size would take too long, unless the size is `fixed` by the user.
    """
    runs = layout.open()
    pixels = np.random.default_rng(0).standard_normal((sizes[-1], *model.shape), dtype=np.float32)
    alone: list[np.ndarray] = []
    found = []
    with ThreadPoolExecutor(len(runs)) as pool:
        list(pool.map(lambda run: run(pixels[:1]), runs))  # the first run allocates
        for size in sizes:
            alone += [runs[0](pixels[row : row + 1])[0] for row in range(len(alone), size)]
            took = []
            for _ in range(_REPEATS):
                started = time.perf_counter()
                answers = list(pool.map(lambda run, size=size: run(pixels[:size]), runs))
                took.append(time.perf_counter() - started)
            exact = all(np.array_equal(answer, np.stack(alone)) for answer in answers)
            found.append(Measured(layout.threads, len(runs), size, len(runs) * size / min(took), exact))
            if not fixed and min(took) * 2 > _MAX_BATCH_S:
                break
    return found


def _cores() -> int:
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A vision export as it is served."""

    artifact: Artifact  # the export
    name: str  # the model name that clients use: the name of the directory
    preprocessing: Preprocessing  # from an image to the input tensor, the same as in calibration
    classes: tuple[str, ...] | None  # names in the order of the outputs; None for a backbone
    activation: Activation  # turns logits into probabilities; none: the outputs are values or features
    input_name: str  # name of the graph's input
    output_name: str  # name of the graph's output

    @property
    def task(self) -> Literal["classify", "predict", "embed"]:
        """The task of the model, served at `/v1/TASK`."""
        if self.classes is None:
            return "embed"
        return "predict" if self.activation == "none" else "classify"

    @property
    def engine(self) -> str:
        """The engine that runs the model, as named by `--engine`."""
        return kind_named(self.artifact.kind).engines[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(3, H, W) of one input."""
        return (3, *self.preprocessing.crop)


def read_model(export: Path) -> ServedModel:
    """Open a vision export, and check the hash of every file except engines, which can be rebuilt.

    Raises:
        BadArtifactError: a file does not match the manifest, or this is not the export of a vision model.
    """
    artifact = open_artifact(export, caches="engines")
    details = artifact.manifest.details
    if not isinstance(details, GraphDetails) or not (artifact.root / PREPROCESSING_FILE).is_file():
        raise BadArtifactError(
            f"{export} is not an export of a vision model",
            why=f"it is of kind {artifact.kind!r}, or lacks {PREPROCESSING_FILE}",
            fix="export a vision model",
        )
    return ServedModel(
        artifact=artifact,
        name=artifact.root.resolve().name,
        preprocessing=read_model_file(Preprocessing, artifact.root / PREPROCESSING_FILE),
        classes=_classes(artifact.root / CLASSES_FILE),
        activation=details.output.activation,
        input_name=details.input.name,
        output_name=details.output.name,
    )


def _classes(path: Path) -> tuple[str, ...] | None:
    if not path.is_file():
        return None
    try:
        return tuple(str(name) for name in json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise BadArtifactError(f"{path} is not a list of names", why=str(error), fix="export it again") from error
