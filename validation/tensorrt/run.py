"""Runs a TensorRT engine on a GPU in a worker process, and returns its outputs and times."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from fp8pipe.core.errors import BadArtifactError

_WORKER: Final = Path(__file__).with_name("run_worker.py")
_MODULES: Final[Mapping[str, str]] = {"rtx": "tensorrt_rtx", "enterprise": "tensorrt"}
_ROUNDS: Final = 100
_TIMEOUT_S: Final = 1800


@dataclass(frozen=True, slots=True)
class Run:
    """The results of a run.

    Attributes:
        outputs: (N, C) float32.
        times_ms: median time by batch size, milliseconds.
        device: name of the GPU.
    """

    outputs: np.ndarray
    times_ms: Mapping[int, float]
    device: str


def run_engine(
    engine: Path, builder: str, pixels: np.ndarray, *, names: tuple[str, str], batch: int, time_batches: Sequence[int]
) -> Run:
    """Run an engine on this machine's GPU.

    Args:
        engine: the engine file.
        builder: "rtx" or "enterprise"; selects the runtime that loads the engine.
        pixels: (N, 3, H, W) float32.
        names: names of the engine's input and output.
        batch: batch size, within the engine's profile; the last batch may be smaller.
        time_batches: batch sizes to time, within the profile.

    Raises:
        BadArtifactError: the engine cannot be loaded or crashes; the runtime's messages are quoted.
    """
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: Path(scratch) / name for name in ("job.json", "answer.json", "pixels.npy", "outputs.npy")}
        np.save(files["pixels.npy"], pixels)
        job: dict[str, Any] = {
            "module": _MODULES[builder], "engine": str(engine), "answer": str(files["answer.json"]),
            "pixels": str(files["pixels.npy"]), "outputs": str(files["outputs.npy"]), "input": names[0],
            "output": names[1], "batch": batch, "time_batches": list(time_batches), "rounds": _ROUNDS,
        }  # fmt: skip
        files["job.json"].write_text(json.dumps(job), encoding="utf-8")
        ended = subprocess.run(
            [sys.executable, "-P", str(_WORKER), str(files["job.json"])],
            capture_output=True, text=True, timeout=_TIMEOUT_S,
        )  # fmt: skip
        found = json.loads(files["answer.json"].read_text()) if files["answer.json"].is_file() else {}
        if ended.returncode != 0:
            said = found.get("messages") or ended.stderr.strip().splitlines()[-1:] or [f"exit code {ended.returncode}"]
            raise BadArtifactError(
                f"the engine {engine.name} does not run",
                why="\n       ".join(text.strip()[:300] for text in said[:5]),
                fix="rebuild it; engines load only with the version and on the GPU that they were built for",
            )
        times = {int(size): float(time) for size, time in found["timings"].items()}
        return Run(np.load(files["outputs.npy"]), times, found["device"])
