"""Runs the engine builders, each in a separate process.

TensorRT for RTX compiles on any machine for the given compute capabilities. TensorRT 10 and 11 (`enterprise`), the
product for data centres, builds only for the GPU of the machine it runs on, since its builder times kernels there. Its
libraries are not on PyPI. So missing requirements are reported before anything is written, together with the
alternatives: NVIDIA's package index, `trtexec` on the serving machine, or TensorRT for RTX, which needs no GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from exporters.tensorrt.listing import EngineLayer, parse_inspector, parse_listing
from exporters.tensorrt.recipe import cache_folder
from exporters.tensorrt.target import CAPABILITIES, EnterpriseSettings
from fp8pipe.core.errors import BadArtifactError, ConfigurationError, GateFailedError, MissingCapabilityError
from fp8pipe.core.machine import gpus

# Run as a file: running it as a module would import its package first, and torch with it.
_WORKER: Final = Path(__file__).with_name("build_worker.py")
_REFUSED: Final = 3
# Minimum, typical and maximum shape of an input.
Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def shapes(three: Iterable[tuple[int, ...]]) -> Shapes:
    """A tuple of exactly three shapes, given in the order minimum, typical, maximum."""
    low, usual, high = three
    return low, usual, high


@dataclass(frozen=True, slots=True)
class Built:
    """A compiled engine."""

    version: str  # version of the builder
    layers: tuple[EngineLayer, ...]  # layers of the engine
    warnings: tuple[str, ...]  # warnings of the builder


def run_builder(
    job: Mapping[str, Any], graph: Path, engine: Path, product: str, *, timeout_s: int, memory: str
) -> dict[str, Any]:
    """Build one engine in a separate process.

    `job` is the input of `build_worker.py` apart from file paths; it must be serializable as JSON. The result holds
    `version`, `messages`, and `listing` (layers in the log) or `inspector` (layers as JSON). `memory` names
    the memory to free, for the error message if the builder crashes.

    Raises:
        GateFailedError: the parser or the builder refuses the graph; the message quotes it.
        BadArtifactError: the builder crashed.
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
                f"the builder of {product} crashed",
                why=last[0][:600],
                fix=f"free some {memory} and try again; if it crashes again, report it with the graph",
            )
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    if not found["built"]:
        said = [*found["errors"], *found["messages"]]
        raise GateFailedError(
            f"the {'builder' if found['parsed'] else 'parser'} of {product} refuses the graph",
            why="\n       ".join(dict.fromkeys(text.strip()[:300] for text in said if text.strip()))
            or "it does not say why",
            fix="choose a format that the compute capabilities support; if they support this one, report it",
        )
    return found


_RTX_TIMEOUT_S: Final = 3600
# Everything besides shapes that determines how an engine is built. Storing layer names does not change its size, and
# the builder's other flags and optimization levels do not change the engine either.
SETTINGS: Final[Mapping[str, str]] = {"typing": "strong", "profiling_verbosity": "DETAILED"}


def build_rtx(graph: Path, engine: Path, capabilities: Sequence[str], profiles: Mapping[str, Shapes]) -> Built:
    """Compile a graph with TensorRT for RTX.

    `capabilities` are compute capabilities such as ("8.9", "12.0"); `profiles` are the shapes of the graph's dynamic
    inputs, by name. The engine is written to `engine`.

    Raises:
        MissingCapabilityError: the package is not installed.
        ConfigurationError: an unknown compute capability.
        GateFailedError: the parser or the builder refuses the graph; the message quotes it.
        BadArtifactError: the builder crashed, or its listing cannot be read.
    """
    unknown = [capability for capability in capabilities if capability not in CAPABILITIES]
    if unknown:
        raise ConfigurationError(
            f"TensorRT for RTX does not compile for {', '.join(unknown)}",
            why=f"it supports {', '.join(CAPABILITIES)}",
            fix="name one of these, or use --builder enterprise for other GPUs",
        )
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
    found = run_builder(job, graph, engine, "TensorRT for RTX", timeout_s=_RTX_TIMEOUT_S, memory="memory")
    return Built(found["version"], parse_listing(found["listing"]), tuple(found["messages"]))


_ENTERPRISE_TIMEOUT_S: Final = 4 * 3600
_OLDEST: Final = (10, 13)
_ELSEWHERE: Final = (
    "; or export with --builder none and build with trtexec where the engine will run (the export's manifest holds "
    "the command), or use --builder rtx, which compiles on any machine"
)


@dataclass(frozen=True, slots=True)
class EnterpriseMachine:
    """The TensorRT version and the GPU of this machine."""

    version: str  # version of TensorRT
    capability: str  # of the GPU, for example "9.0"


def check_enterprise() -> EnterpriseMachine:
    """Check that TensorRT and a GPU are available, or report what is missing.

    Raises:
        MissingCapabilityError: the package, its libraries, a recent enough version, or a GPU is missing.
    """
    if importlib.util.find_spec("tensorrt") is None:
        raise MissingCapabilityError(
            "TensorRT is not installed",
            why="the package tensorrt cannot be imported",
            fix="pip install tensorrt from NVIDIA's package index, on a machine with a GPU" + _ELSEWHERE,
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
            why="strongly typed graphs with FP8 or INT4 need 10.13 or later",
            fix="pip install 'tensorrt>=10.13' from NVIDIA's package index" + _ELSEWHERE,
        )
    found = gpus()
    if not found:
        raise MissingCapabilityError(
            f"TensorRT {version} needs a GPU to build",
            why="torch sees no CUDA device: there is none, its driver is missing, or torch is a CPU build",
            fix="run the export where the engine will run" + _ELSEWHERE,
        )
    major, minor = found[0].capability
    return EnterpriseMachine(version, f"{major}.{minor}")


def build_enterprise(
    graph: Path, engine: Path, machine: EnterpriseMachine, profiles: Mapping[str, Shapes], settings: EnterpriseSettings
) -> Built:
    """Build an engine with TensorRT for the GPU of this machine, and write it to `engine`.

    `profiles` are the shapes of the graph's inputs by name. Kernel timings are kept in the cache for the next build.

    Raises:
        GateFailedError: the parser or the builder refuses the graph; the message quotes it.
        BadArtifactError: the builder crashed, or the output of the engine inspector cannot be read.
    """
    found = run_builder(
        job(machine, profiles, settings),
        graph,
        engine,
        "TensorRT",
        timeout_s=_ENTERPRISE_TIMEOUT_S,
        memory="memory of the GPU",
    )
    return Built(found["version"], parse_inspector(found["inspector"]), tuple(found["messages"]))


def job(machine: EnterpriseMachine, profiles: Mapping[str, Shapes], settings: EnterpriseSettings) -> dict[str, Any]:
    """The input of `build_worker.py` for TensorRT, apart from file paths; serializable as JSON."""
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
    """The command line that builds the same engine on the serving machine with NVIDIA's `trtexec`.

    One line for a shell; the engine, its layers and the timing cache are written to the current directory. Every flag
    exists in 10.x and in 11.x. `--stronglyTyped` is required by 10.x and accepted by 11.x, where networks are always
    strongly typed. No precision flags are given: the graph holds the types, and 11.x has no such flags.

    `graph` is the path as it should appear in the command; profiles use the graph's input names; `workspace_mib` is the
    builder's scratch memory in MiB; with `version_compatible`, later versions of the same major version load the
    engine.
    """
    shapes = [
        f"--{flag}Shapes=" + ",".join(f"{name}:{'x'.join(map(str, s[index]))}" for name, s in profiles.items())
        for index, flag in enumerate(("min", "opt", "max"))
    ]
    flags = [
        f"--onnx={graph}", "--saveEngine=model.engine", "--stronglyTyped", *(shapes if profiles else []),
        f"--memPoolSize=workspace:{workspace_mib}", "--timingCacheFile=timing.cache",
        "--profilingVerbosity=detailed", "--exportLayerInfo=model.layers.json",
        *(["--versionCompatible"] if version_compatible else []), "--skipInference",
    ]  # fmt: skip
    return shlex.join(["trtexec", *flags])
