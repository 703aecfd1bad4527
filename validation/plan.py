"""What validating, measuring or checking an export would take: for dry runs, in which no engine is started.

Memory of a process of ours is that of its packages, measured by importing them, and of the weights, counted from the
manifest. An engine's is reckoned from its weights and its cache, and the plan says so.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from exporters.vllm.device import require_known_device
from exporters.vllm.environment import find_vllm_python, inspect_environment
from exporters.vllm.form import ServingForm
from fp8pipe.artifact import Artifact, open_artifact
from fp8pipe.artifact.kinds import VIT_KIND
from fp8pipe.core.errors import MissingCapabilityError
from fp8pipe.core.plan import Missing, PhaseMeter, Plan, can_measure, missing_memory, missing_packages

RECORD_BYTES: Final = 16_384  # a record beside an export, about
_GRAPH_COPIES: Final = 6.0  # fp32: the file, the model it is compared with, sessions
# vLLM for CPUs with nothing loaded, and its key/value cache as our commands start it.
_VLLM_BYTES, _CACHE_BYTES = 900_000_000, 1 << 30
_VLLM_COPIES: Final = 2.0  # fp32: as loaded, and as the engine lays them out
_PACKAGES: Final = ("onnx", "onnx-ir", "onnxruntime")
_ONNX_MODULES: Final[Mapping[str, tuple[str, ...]]] = {
    "validate": ("validation.onnx.validate", "onnxruntime", "onnx_ir"),
    "bench": ("validation.bench.speed", "onnxruntime"),
    # The service, too, which is started as a process of its own.
    "serve-check": ("validation.bench.check", "fastapi", "uvicorn", "onnxruntime"),
}


def plan_vllm(
    artifact: Artifact, stage: str, record: Path, *, vllm_python: str | None = None, against: Path | None = None,
    form: ServingForm | None = None,
) -> Plan:  # fmt: skip
    """Plan a command that runs an export in vLLM and writes a record beside it.

    Args:
        artifact: the export.
        stage: validate, bench or serve-check.
        record: where the record would go.
        vllm_python: vLLM's interpreter; found when None.
        against: what else is read.
        form: how the engine would be started, which changes nothing here.
    """
    peak = int(_VLLM_BYTES + _CACHE_BYTES + _VLLM_COPIES * _float_bytes(artifact))
    hardware, missing = _vllm_here(vllm_python)
    return _plan(
        artifact, record, peak, missing, (against,), hardware=hardware,
        packages=("vllm, in an environment of its own",),
        note="memory of vLLM is estimated: itself, a cache of 1 GiB, and two copies of the weights in fp32",
    )  # fmt: skip


def plan_onnx(
    artifact: Artifact, stage: str, record: Path, *, against: Path | None = None, images: Path | None = None
) -> Plan:
    """The same for ONNX Runtime; `against` is run on empty images.

    Raises:
        BadArtifactError: `against` is no artifact.
    """
    missing = missing_packages(_PACKAGES)
    peak = None if missing else _own_peak(artifact, _ONNX_MODULES[stage], against=against)
    return _plan(artifact, record, peak, missing, (against, images), packages=_PACKAGES)


def plan_tensorrt(
    artifact: Artifact, stage: str, record: Path, *, against: Path | None = None, device: str = "auto"
) -> Plan:
    """The same for TensorRT, whose engines run on a GPU alone; `device` changes no figure."""
    missing = missing_packages(_PACKAGES)
    peak = None if missing else _own_peak(artifact, ("validation.tensorrt.validate",))
    hardware = "a CPU for proofs; a GPU to run the engines"
    return _plan(artifact, record, peak, missing, (against,), packages=_PACKAGES, hardware=hardware)


def _plan(
    artifact: Artifact, record: Path, peak: int | None, missing: tuple[Missing, ...], reads: Sequence[Path | None], *,
    packages: tuple[str, ...], hardware: str = "a CPU",
    note: str = "memory: packages measured here, copies of the weights counted",
) -> Plan:  # fmt: skip
    return Plan(
        reads=(f"{artifact.root} ({artifact.kind})", *(str(path) for path in reads if path is not None)),
        writes=(str(record),),
        peak_memory_bytes=peak,
        disk_bytes=RECORD_BYTES,
        output_bytes=RECORD_BYTES,
        hardware=hardware,
        packages=packages,
        missing=(*missing, *missing_memory(peak, "free memory")),
        notes=(note,),
        facts={"export_bytes": artifact.size_bytes},
    )


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
    from exporters.graph.plan import run_model
    from fp8pipe.models.vision.quantized import load_quantized

    run_model(load_quantized(open_artifact(against, kind=VIT_KIND).root))


def _float_bytes(artifact: Artifact) -> int:
    """All linear weights in fp32, from the shapes in the manifest; never less than the files hold."""
    linears = sum(4 * math.prod(layer.shape) for layer in artifact.manifest.layers if layer.shape)
    return max(linears, artifact.size_bytes)


def _vllm_here(vllm_python: str | None) -> tuple[str, tuple[Missing, ...]]:
    """The hardware that vLLM was built for, and what it lacks here."""
    hardware = "a CPU"
    try:
        environment = inspect_environment(find_vllm_python(vllm_python))
        hardware = hardware if environment.on_cpu else "a GPU"
        require_known_device(environment)
    except MissingCapabilityError as error:
        return hardware, (Missing(f"{error.what}: {error.why}", error.fix),)
    return hardware, ()
