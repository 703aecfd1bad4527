"""TensorRT for RTX: compiles on any machine, for the compute capabilities it is told."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from exporters.tensorrt.listing import EngineLayer, parse_listing
from fp8pipe.core.errors import BadArtifactError, ConfigurationError, GateFailedError, MissingCapabilityError

__all__ = ["CAPABILITIES", "SETTINGS", "Built", "Shapes", "build_rtx", "check_capabilities", "refused"]

# What its enumeration names. Hopper is not among them.
CAPABILITIES: Final[Mapping[str, str]] = {
    "7.5": "SM75", "8.0": "SM80", "8.6": "SM86", "8.9": "SM89", "12.0": "SM120", "12.1": "SM121",
}  # fmt: skip
# Run as a file: as a module it would import its package first, and torch with that.
_WORKER: Final = Path(__file__).with_name("rtx_worker.py")
_TIMEOUT_S: Final = 3600
_REFUSED: Final = 3
# What an engine is built with besides shapes. Names of layers cost no byte of it, and the builder's other flags and
# levels change none either.
SETTINGS: Final[Mapping[str, str]] = {"typing": "strong", "profiling_verbosity": "DETAILED"}
# Smallest, usual and largest shape of an input.
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Built:
    """A compiled engine.

    Attributes:
        version: of TensorRT for RTX.
        layers: as listed by the builder.
        warnings: of the builder.
    """

    version: str
    layers: tuple[EngineLayer, ...]
    warnings: tuple[str, ...]


def check_capabilities(wanted: Sequence[str]) -> None:
    """Refuse compute capabilities that the builder cannot compile for.

    Raises:
        ConfigurationError: naming them and those it can.
    """
    unknown = [capability for capability in wanted if capability not in CAPABILITIES]
    if unknown:
        raise ConfigurationError(
            f"TensorRT for RTX does not compile for {', '.join(unknown)}",
            why=f"it knows {', '.join(CAPABILITIES)}",
            fix="name one of these, or use --builder enterprise for other GPUs",
        )


def build_rtx(graph: Path, engine: Path, capabilities: Sequence[str], profiles: Mapping[str, Shapes]) -> Built:
    """Compile a graph.

    Args:
        graph: ONNX file.
        engine: file to write.
        capabilities: for instance ("8.9", "12.0").
        profiles: shapes of the dynamic inputs, by name.

    Raises:
        MissingCapabilityError: the package is not installed.
        ConfigurationError: an unknown compute capability.
        GateFailedError: the parser or the builder refuses the graph; its own words are in the message.
        BadArtifactError: the builder died, or its listing cannot be read.
    """
    check_capabilities(capabilities)
    if importlib.util.find_spec("tensorrt_rtx") is None:
        raise MissingCapabilityError(
            "TensorRT for RTX is not installed",
            why="the package tensorrt_rtx cannot be imported",
            fix="pip install 'fp8pipe[trt-rtx]', or export the graph alone with --builder none",
        )
    with tempfile.TemporaryDirectory() as scratch:
        answer, job = Path(scratch) / "answer.json", Path(scratch) / "job.json"
        described = {
            "graph": str(graph), "engine": str(engine), "answer": str(answer), "profiles": profiles,
            "parent": os.getpid(),
            "verbosity": SETTINGS["profiling_verbosity"],
            "capabilities": [CAPABILITIES[capability] for capability in capabilities],
        }  # fmt: skip
        job.write_text(json.dumps(described), encoding="utf-8")
        ended = subprocess.run(
            [sys.executable, "-P", str(_WORKER), str(job)], capture_output=True, text=True, timeout=_TIMEOUT_S
        )
        if ended.returncode not in (0, _REFUSED) or not answer.is_file():
            last = ended.stderr.strip().splitlines()[-1:] or [f"exit code {ended.returncode}"]
            raise BadArtifactError(
                "the builder of TensorRT for RTX died",
                why=last[0][:600],
                fix="free some memory, and try again; then report it with the graph",
            )
        found = json.loads(answer.read_text(encoding="utf-8"))
    if not found["built"]:
        raise refused("TensorRT for RTX", found["parsed"], [*found["errors"], *found["messages"]])
    return Built(found["version"], parse_listing(found["listing"]), tuple(found["messages"]))


def refused(product: str, parsed: bool, said: Sequence[str]) -> GateFailedError:
    """The error for a graph that a builder refuses, in the builder's words."""
    who = "builder" if parsed else "parser"
    return GateFailedError(
        f"the {who} of {product} refuses the graph",
        why="\n       ".join(dict.fromkeys(text.strip()[:300] for text in said if text.strip()))
        or "it does not say why",
        fix="choose a format that the compute capabilities have; otherwise report it, with the graph",
    )
