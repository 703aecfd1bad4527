"""The graph as Triton must get it: what it computes may not depend on settings that Triton does not pass on.

Triton's ONNX Runtime backend hands one session entry to the runtime (an allocator's) and no list of optimizers
(`ModelState` in its src/onnxruntime.cc, 2026-06). Under the runtime's defaults integer sums saturate on x64 processors
without VNNI, a classifier runs in float, and activations beside INT4 weights are rounded to 8 bits, all without a word.
So for CPUs the graph is written as the optimizer leaves it under the export's own settings: integer operators stand in
it, and no default turns them into others. Then both are run, the export as it was proved and the new file as Triton
will run it, and must agree in every bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import numpy as np

from exporters.graph.packages import import_onnx_package
from exporters.graph.runtime import PRECISION_MODE, has_vnni, open_session
from fp8pipe.core.errors import BadArtifactError, GateFailedError, MissingCapabilityError

_IMAGES: Final = 4
# Three times what normalized pixels are: many activations at the ends of their ranges, where sums are largest.
_PIXEL_SPREAD: Final = 3.0


class TritonDevice(StrEnum):
    """Where Triton is to compute."""

    CPU = "cpu"
    CPU_VNNI = "cpu-vnni"
    GPU = "gpu"


def write_graph(source: Path, target: Path, device: TritonDevice, entries: Mapping[str, str]) -> int:
    """Write the graph of an ONNX export for a device; the number of outputs per image.

    Args:
        source: `model.onnx` of the export.
        target: the file to write.
        device: `CPU` computes the same on any processor; `CPU_VNNI` about twice as fast on one that has VNNI; `GPU`
            takes the Q/DQ graph as it is.
        entries: the session entries that the export was proved with.

    Raises:
        BadArtifactError: ONNX Runtime refuses the graph, or its outputs have no fixed number.
        GateFailedError: the two differ in a bit.
        MissingCapabilityError: a graph for VNNI cannot be compared on a processor without it.
    """
    proved = open_session(source)
    width = _width(proved, source)
    if device is TritonDevice.GPU:
        shutil.copyfile(source, target)
        return width
    if device is TritonDevice.CPU_VNNI:
        if not has_vnni():
            raise MissingCapabilityError(
                "a graph for VNNI cannot be compared with the export here", why="this processor has no VNNI",
                fix="write it on a machine like Triton's, or leave --device at cpu, which is right on any",
            )  # fmt: skip
        entries = {name: value for name, value in entries.items() if name != PRECISION_MODE}
    _optimize(source, target, entries)
    _compare(proved, _as_triton(target), target)
    return width


def _optimize(source: Path, target: Path, entries: Mapping[str, str]) -> None:
    open_session(source, write_to=target, portable=True, entries=entries)


def _as_triton(path: Path) -> Any:
    """A session as Triton's backend makes one: every optimization, no entries."""
    runtime = import_onnx_package("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _compare(proved: Any, written: Any, path: Path) -> None:
    source = proved.get_inputs()[0]
    pixels = np.random.default_rng(0).normal(0.0, _PIXEL_SPREAD, (_IMAGES, *source.shape[1:])).astype(np.float32)
    expected, found = (session.run(None, {source.name: pixels})[0] for session in (proved, written))
    differing = int((expected.view(np.uint32) != found.view(np.uint32)).sum())
    if differing:
        raise GateFailedError(
            f"{path.name} for Triton does not compute what the export does",
            why=f"{differing} of {expected.size} outputs of {_IMAGES} random images differ in a bit",
            fix="nothing was written; report this with the version of onnxruntime",
        )


def _width(session: Any, path: Path) -> int:
    size = session.get_outputs()[0].shape[-1]
    if not isinstance(size, int) or size < 1:
        raise BadArtifactError(f"{path} has no fixed number of outputs", why="Triton needs one", fix="export again")
    return size
