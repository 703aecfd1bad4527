"""TensorRT 10 and 11, the product for data centres: builds on the GPU that will run the engine, and for that one.

Its libraries are not among the packages of the public index, and its builder times kernels on the device. So what is
missing is said before anything is written, with the ways out: where the libraries are, `trtexec` on the machine that
serves, or TensorRT for RTX, which needs neither.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field

from exporters.tensorrt.inspector import parse_inspector
from exporters.tensorrt.recipe import cache_folder
from exporters.tensorrt.rtx import Built, Shapes, refused
from fp8pipe.core.config import Flag, FrozenConfig
from fp8pipe.core.errors import BadArtifactError, MissingCapabilityError
from fp8pipe.core.machine import gpus

__all__ = ["EnterpriseMachine", "EnterpriseSettings", "build_enterprise", "check_enterprise"]

_WORKER: Final = Path(__file__).with_name("enterprise_worker.py")
_TIMEOUT_S: Final = 4 * 3600
_REFUSED: Final = 3
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


class EnterpriseSettings(FrozenConfig):
    """How the builder is set up; part of an engine's recipe."""

    workspace_mib: Annotated[int, Flag("workspace")] = Field(
        default=4096, gt=0, description="enterprise: scratch memory that kernels may take, MiB"
    )
    optimization_level: int = Field(default=3, ge=0, le=5, description="effort of the search; 3 is its default")
    version_compatible: Annotated[bool, Flag("version-compatible")] = Field(
        default=False, description="enterprise: engines that later versions load, too"
    )

    @staticmethod
    def network_flags(version: str) -> tuple[str, ...]:
        """Names of NetworkDefinitionCreationFlag: 11 knows strongly typed networks only, 10 must be asked for one."""
        return ("STRONGLY_TYPED",) if int(version.split(".")[0]) < 11 else ()

    def builder_flags(self) -> tuple[str, ...]:
        """Names of BuilderFlag, in 10 and 11 alike; none of precision: strong typing allows none, and 11 has none."""
        return ("VERSION_COMPATIBLE",) if self.version_compatible else ()


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

    Args:
        graph: ONNX file.
        engine: file to write.
        machine: of `check_enterprise`.
        profiles: shapes of the dynamic inputs, by name.
        settings: of the builder.

    Raises:
        GateFailedError: the parser or the builder refuses the graph; its own words are in the message.
        BadArtifactError: the builder died, or the engine's inspector cannot be read.
    """
    with tempfile.TemporaryDirectory() as scratch:
        answer, path = Path(scratch) / "answer.json", Path(scratch) / "job.json"
        path.write_text(json.dumps(job(graph, engine, answer, machine, profiles, settings)), encoding="utf-8")
        ended = subprocess.run(
            [sys.executable, "-P", str(_WORKER), str(path)], capture_output=True, text=True, timeout=_TIMEOUT_S
        )
        if ended.returncode not in (0, _REFUSED) or not answer.is_file():
            last = ended.stderr.strip().splitlines()[-1:] or [f"exit code {ended.returncode}"]
            raise BadArtifactError(
                "the builder of TensorRT died",
                why=last[0][:600],
                fix="free some memory of the GPU, and try again; then report it with the graph",
            )
        found = json.loads(answer.read_text(encoding="utf-8"))
    if not found["built"]:
        raise refused("TensorRT", found["parsed"], [*found["errors"], *found["messages"]])
    return Built(found["version"], parse_inspector(found["inspector"]), tuple(found["messages"]))


def job(
    graph: Path, engine: Path, answer: Path, machine: EnterpriseMachine, profiles: Mapping[str, Shapes],
    settings: EnterpriseSettings,
) -> dict[str, Any]:  # fmt: skip
    """What the worker is told; all of it is JSON."""
    return {
        "graph": str(graph), "engine": str(engine), "answer": str(answer), "profiles": dict(profiles),
        "parent": os.getpid(),
        "network_flags": list(settings.network_flags(machine.version)),
        "builder_flags": list(settings.builder_flags()),
        "workspace_bytes": settings.workspace_mib << 20,
        "optimization_level": settings.optimization_level,
        "timing_cache": str(cache_folder() / f"timing-{machine.version}-{machine.capability}.cache"),
    }  # fmt: skip
