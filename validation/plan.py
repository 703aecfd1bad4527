"""What validating, measuring or checking an export would take: for dry runs, in which no engine is started.

Memory of a process of ours is that of its packages, measured by importing them, and of the weights, counted from the
manifest. An engine's is reckoned from its weights and its cache, and the plan says so.
"""

from __future__ import annotations

import importlib
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from exporters.graph.description import MODEL_FILE
from exporters.triton.graph import TritonDevice
from exporters.vllm.environment import find_vllm_python, inspect_environment
from fp8pipe.artifact import Artifact, open_artifact
from fp8pipe.core.errors import MissingCapabilityError
from fp8pipe.core.phases import PhaseMeter, can_measure
from fp8pipe.core.plan import Missing, Plan, missing_disk, missing_memory, missing_packages

__all__ = ["RECORD_BYTES", "plan_engine", "plan_repository"]

RECORD_BYTES: Final = 16_384  # a record beside an export, about
_GRAPH_COPIES: Final = 6.0  # fp32: the file, the model it is compared with, sessions
# vLLM for CPUs with nothing loaded, and its key/value cache as our commands start it.
_VLLM_BYTES, _CACHE_BYTES = 900_000_000, 1 << 30
_VLLM_COPIES: Final = 2.0  # fp32: as loaded, and as the engine lays them out
_MODULES: Final[Mapping[str, Mapping[str, tuple[str, ...]]]] = {
    "validate": {
        "onnx-export": ("validation.onnx.validate", "onnxruntime", "onnx_ir"),
        "trt-export": ("validation.tensorrt.validate",),
    },
    "bench": {"onnx-export": ("validation.bench.vision", "onnxruntime")},
    "serve-check": {"onnx-export": ("validation.bench.check", "serving.vision.server", "onnxruntime")},
}
_PACKAGES: Final = {"onnx-export": ("onnx", "onnx-ir", "onnxruntime"), "trt-export": ("onnx", "onnx-ir", "onnxruntime")}


def plan_engine(
    artifact: Artifact,
    stage: str,
    record: Path,
    *,
    vllm_python: str | None = None,
    against: Path | None = None,
    reads: Sequence[str] = (),
) -> Plan:
    """Plan a command that runs an export in its engine and writes a record beside it.

    Args:
        artifact: the export.
        stage: validate, bench or serve-check.
        record: where the record would go.
        vllm_python: vLLM's interpreter; found when None.
        against: the artifact that a vision export is compared with; it is run on empty images.
        reads: what else is read.

    Raises:
        BadArtifactError: `against` is no artifact.
    """
    language = artifact.kind == "vllm-export"
    packages = () if language else _PACKAGES[artifact.kind]
    missing = missing_packages(packages)
    if language:
        missing += _missing_vllm(vllm_python)
        peak: int | None = int(_VLLM_BYTES + _CACHE_BYTES + _VLLM_COPIES * _float_bytes(artifact))
        note = "memory of vLLM is reckoned: itself, a cache of 1 GiB, and two copies of the weights in fp32"
    else:
        peak = None if missing else _own_peak(artifact, _MODULES[stage][artifact.kind], against=against)
        note = "memory: packages measured here, copies of the weights counted"
    return Plan(
        reads=(f"{artifact.root} ({artifact.kind})", *reads),
        writes=(str(record),),
        peak_memory_bytes=peak,
        disk_bytes=RECORD_BYTES,
        output_bytes=RECORD_BYTES,
        hardware="a CPU" if artifact.kind != "trt-export" else "a CPU for proofs; a GPU to run the engines",
        packages=("vllm, in an environment of its own",) if language else packages,
        missing=(*missing, *missing_memory(peak, "free memory")),
        notes=(note,),
        facts={"export_bytes": artifact.size_bytes},
    )


def plan_repository(artifact: Artifact, output: Path, device: TritonDevice) -> Plan:
    """Plan a model repository: a copy of the export's files, or its graph as a CPU gets it."""
    target = output / artifact.root.resolve().name
    return Plan(
        reads=(f"{artifact.root} ({artifact.kind})",),
        writes=(f"{target}{' (exists already: will be refused)' if target.exists() else ''}",),
        peak_memory_bytes=_repository_peak(artifact, device),
        disk_bytes=artifact.size_bytes,
        output_bytes=artifact.size_bytes,
        missing=missing_disk(output, artifact.size_bytes),
        facts={"kind": artifact.kind},
    )


def _repository_peak(artifact: Artifact, device: TritonDevice) -> int | None:
    """The one large step is done, in a folder that goes again."""
    if not can_measure():
        return None
    with PhaseMeter() as meter, tempfile.TemporaryDirectory() as scratch:
        meter.enter("graph")
        from exporters.triton.graph import write_graph

        if artifact.kind == "onnx-export":
            entries = artifact.manifest.runtime.get("session_entries", {})
            write_graph(artifact.root / MODEL_FILE, Path(scratch) / MODEL_FILE, device, entries)
    return meter.phases["graph"].peak_bytes


def _own_peak(artifact: Artifact, modules: Sequence[str], *, against: Path | None = None) -> int | None:
    """Resident memory with these modules imported, the passes of `against`, and the weights."""
    if not can_measure():
        return None
    with PhaseMeter() as meter:
        meter.enter("imports")
        for module in modules:
            importlib.import_module(module)
        if against is not None:
            _run(against)
    return meter.phases["imports"].peak_bytes + int(_GRAPH_COPIES * _float_bytes(artifact))


def _run(against: Path) -> None:
    from exporters.graph.dry_run import run_model
    from fp8pipe.models.vision.quantized import load_quantized

    run_model(load_quantized(open_artifact(against, kind="vit").root))


def _float_bytes(artifact: Artifact) -> int:
    """All linear weights in fp32, from the shapes in the manifest; never less than the files hold."""
    linears = sum(4 * math.prod(layer.shape) for layer in artifact.manifest.layers if layer.shape)
    return max(linears, artifact.size_bytes)


def _missing_vllm(vllm_python: str | None) -> tuple[Missing, ...]:
    try:
        inspect_environment(find_vllm_python(vllm_python))
    except MissingCapabilityError as error:
        return (Missing(f"{error.what}: {error.why}", error.fix),)
    return ()
