"""TensorRT 10 and 11, the product for data centres: builds on the GPU that will run the engine, and for that one.

Its libraries are not among the packages of the public index, and its builder times kernels on the device. So what is
missing is said before anything is written, with the ways out: where the libraries are, `trtexec` on the machine that
serves, or TensorRT for RTX, which needs neither.
"""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from exporters.tensorrt.builder import Built, Shapes, run_builder
from exporters.tensorrt.listing import parse_inspector
from exporters.tensorrt.options import EnterpriseSettings
from exporters.tensorrt.recipe import cache_folder
from fp8pipe.core.errors import MissingCapabilityError
from fp8pipe.core.machine import gpus

__all__ = ["EnterpriseMachine", "build_enterprise", "check_enterprise", "trtexec_command"]

_TIMEOUT_S: Final = 4 * 3600
_OLDEST: Final = (10, 13)
_ELSEWHERE: Final = (
    "; or export with --builder none and build with trtexec where the engine will run (the export's manifest holds "
    "the command), or use --builder rtx, which compiles on any machine"
)


@dataclass(frozen=True, slots=True)
class EnterpriseMachine:
    """What builds here.

    Attributes:
        version: of TensorRT.
        capability: of the GPU, for instance "9.0".
    """

    version: str
    capability: str


def check_enterprise() -> EnterpriseMachine:
    """TensorRT and a GPU, or what is missing.

    Raises:
        MissingCapabilityError: the package, its libraries, a recent enough version, or a GPU.
    """
    if importlib.util.find_spec("tensorrt") is None:
        raise MissingCapabilityError(
            "TensorRT is not installed",
            why="the package tensorrt cannot be imported",
            fix="pip install tensorrt, with NVIDIA's package index, on a machine with a GPU" + _ELSEWHERE,
        )
    said = subprocess.run(
        [sys.executable, "-P", "-c", "import tensorrt; print(tensorrt.__version__)"], capture_output=True, text=True
    )
    if said.returncode != 0:
        raise MissingCapabilityError(
            "TensorRT's libraries are missing",
            why=(said.stderr.strip().splitlines() or ["import tensorrt fails"])[-1][:300],
            fix="install the libraries of that version (tensorrt-cu13-libs), from NVIDIA's package index" + _ELSEWHERE,
        )
    version = said.stdout.strip()
    if tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        raise MissingCapabilityError(
            f"TensorRT {version} is too old",
            why="FP8 and INT4 graphs with strong typing are built by 10.13 and later",
            fix="pip install 'tensorrt>=10.13', with NVIDIA's package index" + _ELSEWHERE,
        )
    found = gpus()
    if not found:
        raise MissingCapabilityError(
            f"TensorRT {version} needs a GPU to build",
            why="torch sees no CUDA device: none is there, its driver is missing, or torch is a CPU build",
            fix="run the export where the engine will run" + _ELSEWHERE,
        )
    major, minor = found[0].capability
    return EnterpriseMachine(version, f"{major}.{minor}")


def build_enterprise(
    graph: Path, engine: Path, machine: EnterpriseMachine, profiles: Mapping[str, Shapes], settings: EnterpriseSettings
) -> Built:
    """Build for the GPU of this machine. Timings are kept in the cache, for the next build.

    Raises:
        GateFailedError: the parser or the builder refuses the graph; its own words are in the message.
        BadArtifactError: the builder died, or the engine's inspector cannot be read.
    """
    found = run_builder(
        job(machine, profiles, settings), graph, engine, "TensorRT", timeout_s=_TIMEOUT_S, memory="memory of the GPU"
    )
    return Built(found["version"], parse_inspector(found["inspector"]), tuple(found["messages"]))


def job(machine: EnterpriseMachine, profiles: Mapping[str, Shapes], settings: EnterpriseSettings) -> dict[str, Any]:
    """What the worker is told beside files; all of it is JSON."""
    return {
        "package": "tensorrt", "profiles": dict(profiles), "inspect": True,
        "network_flags": list(settings.network_flags(machine.version)),
        "builder_flags": list(settings.builder_flags()),
        "workspace_bytes": settings.workspace_mib << 20,
        "optimization_level": settings.optimization_level,
        "timing_cache": str(cache_folder() / f"timing-{machine.version}-{machine.capability}.cache"),
    }  # fmt: skip


def trtexec_command(
    graph: str, profiles: Mapping[str, Shapes], *, workspace_mib: int, version_compatible: bool = False
) -> str:
    """The command line that builds the same engine elsewhere: on the machine that will serve, with NVIDIA's `trtexec`.

    One line for a shell; the engine, its layers and the timing cache are written where it is run. Every flag is one of
    10.x and of 11.x. `--stronglyTyped` is needed by 10.x, and accepted by 11.x, where networks are always strongly
    typed. Flags of precision are not given: the graph holds the types, and 11.x has none.

    Args:
        graph: path of the ONNX file, as it is to be written.
        profiles: smallest, usual and largest shape of each input; the names are the graph's.
        workspace_mib: scratch memory of the builder, MiB.
        version_compatible: whether later versions of the same major one shall load the engine.
    """
    shapes = [
        f"--{flag}Shapes=" + ",".join(f"{name}:{_sides(shape[index])}" for name, shape in profiles.items())
        for index, flag in enumerate(("min", "opt", "max"))
    ]
    flags = [
        f"--onnx={graph}", "--saveEngine=model.engine", "--stronglyTyped", *(shapes if profiles else []),
        f"--memPoolSize=workspace:{workspace_mib}", "--timingCacheFile=timing.cache",
        "--profilingVerbosity=detailed", "--exportLayerInfo=model.layers.json",
        *(["--versionCompatible"] if version_compatible else []), "--skipInference",
    ]  # fmt: skip
    return shlex.join(["trtexec", *flags])


def _sides(shape: tuple[int, ...]) -> str:
    return "x".join(str(side) for side in shape)
