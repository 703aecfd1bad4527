"""TensorRT for RTX: compiles on any machine, for the compute capabilities it is told."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from exporters.tensorrt.builder import Built, Shapes, run_builder
from exporters.tensorrt.listing import parse_listing
from exporters.tensorrt.options import CAPABILITIES
from fp8pipe.core.errors import ConfigurationError, MissingCapabilityError

__all__ = ["SETTINGS", "build_rtx", "check_capabilities"]

_TIMEOUT_S: Final = 3600
# What an engine is built with besides shapes. Names of layers cost no byte of it, and the builder's other flags and
# levels change none either.
SETTINGS: Final[Mapping[str, str]] = {"typing": "strong", "profiling_verbosity": "DETAILED"}


def check_capabilities(wanted: Sequence[str]) -> None:
    """Refuse compute capabilities that the builder cannot compile for, naming them and those it can."""
    unknown = [capability for capability in wanted if capability not in CAPABILITIES]
    if unknown:
        raise ConfigurationError(
            f"TensorRT for RTX does not compile for {', '.join(unknown)}",
            why=f"it knows {', '.join(CAPABILITIES)}",
            fix="name one of these, or use --builder enterprise for other GPUs",
        )


def build_rtx(graph: Path, engine: Path, capabilities: Sequence[str], profiles: Mapping[str, Shapes]) -> Built:
    """Compile a graph for compute capabilities, for instance ("8.9", "12.0"); profiles of its dynamic inputs by name.

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
    job = {
        "package": "tensorrt_rtx", "profiles": profiles, "network_flags": ["STRONGLY_TYPED"], "inspect": False,
        "capabilities": [CAPABILITIES[capability] for capability in capabilities],
    }  # fmt: skip
    found = run_builder(job, graph, engine, "TensorRT for RTX", timeout_s=_TIMEOUT_S, memory="memory")
    return Built(found["version"], parse_listing(found["listing"]), tuple(found["messages"]))
