"""What both builders have in common: shapes, the process that builds, and what is had from it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from exporters.tensorrt.listing import EngineLayer
from fp8pipe.core.errors import BadArtifactError, GateFailedError

__all__ = ["Built", "Shapes", "run_builder"]

# Run as a file: as a module it would import its package first, and torch with that.
_WORKER: Final = Path(__file__).with_name("build_worker.py")
_REFUSED: Final = 3
# Smallest, usual and largest shape of an input.
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Built:
    """A compiled engine.

    Attributes:
        version: of the builder.
        layers: of the engine.
        warnings: of the builder.
    """

    version: str
    layers: tuple[EngineLayer, ...]
    warnings: tuple[str, ...]


def run_builder(
    job: Mapping[str, Any], graph: Path, engine: Path, product: str, *, timeout_s: int, memory: str
) -> dict[str, Any]:
    """Build one engine in a process of its own.

    `job` is what `build_worker.py` is told beside files; all of it is JSON. The answer holds `version`, `messages`, and
    `listing` (layers in its log) or `inspector` (layers as JSON). `memory` is what to free when it dies.

    Raises:
        GateFailedError: the parser or the builder refuses the graph; its own words are in the message.
        BadArtifactError: the builder died.
    """
    with tempfile.TemporaryDirectory() as scratch:
        answer, path = Path(scratch) / "answer.json", Path(scratch) / "job.json"
        files = {"graph": str(graph), "engine": str(engine), "answer": str(answer), "parent": os.getpid()}
        path.write_text(json.dumps({**job, **files}), encoding="utf-8")
        ended = subprocess.run(
            [sys.executable, "-P", str(_WORKER), str(path)], capture_output=True, text=True, timeout=timeout_s
        )
        if ended.returncode not in (0, _REFUSED) or not answer.is_file():
            last = ended.stderr.strip().splitlines()[-1:] or [f"exit code {ended.returncode}"]
            raise BadArtifactError(
                f"the builder of {product} died",
                why=last[0][:600],
                fix=f"free some {memory}, and try again; then report it with the graph",
            )
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    if not found["built"]:
        said = [*found["errors"], *found["messages"]]
        raise GateFailedError(
            f"the {'builder' if found['parsed'] else 'parser'} of {product} refuses the graph",
            why="\n       ".join(dict.fromkeys(text.strip()[:300] for text in said if text.strip()))
            or "it does not say why",
            fix="choose a format that the compute capabilities have; otherwise report it, with the graph",
        )
    return found
