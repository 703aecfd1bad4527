"""Estimates what `validate`, `bench`, `serve-check` and `serve` need, for dry runs, which start no engine.

For processes of fp8pipe, the memory of imported packages is measured by importing them, and the memory of weights is
computed from the manifest. The memory of vLLM is estimated from its weights and its cache; the plan says so. Files are
not hashed and weights are not read, so a plan takes seconds for an export of any size.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from exporters.vllm.device import require_devices, require_known_device
from exporters.vllm.environment import find_vllm_python, inspect_environment
from exporters.vllm.form import ServingForm
from fp8pipe.artifact import Artifact, open_artifact
from fp8pipe.artifact.kinds import VIT_KIND
from fp8pipe.core.errors import MissingCapabilityError
from fp8pipe.core.machine import format_bytes
from fp8pipe.core.plan import Missing, PhaseMeter, Plan, can_measure, missing_memory, missing_packages
from fp8pipe.models.checkpoint.tensors import header_entries, is_scale
from validation.bench.record import measure_path
from validation.tasks.record import EvaluateConfig

RECORD_BYTES: Final = 16_384  # approximate size of a record next to an export
_GRAPH_COPIES: Final = 6.0  # fp32 copies of the weights: the file, the model it is compared with, the sessions
_VLLM_BYTES: Final = 1_200_000_000  # vLLM for CPUs without a model and its cache
# Parity is checked in fp32 on an engine that keeps its weights: as loaded, and as packed for its GEMMs. An engine that
# serves keeps only the packed ones, in its own dtype.
_PARITY_COPIES: Final = 2
_ITEMSIZES: Final = {"float32": 4}
_PACKAGES: Final = ("onnx", "onnx-ir", "onnxruntime")
_ONNX_MODULES: Final[Mapping[str, tuple[str, ...]]] = {
    "validate": ("validation.onnx.validate", "onnxruntime", "onnx_ir"),
    "bench": ("validation.bench.speed", "onnxruntime"),
    # Includes the packages of the service, which runs as a separate process.
    "serve-check": ("validation.bench.check", "fastapi", "uvicorn", "onnxruntime"),
    "serve": ("fastapi", "uvicorn", "onnxruntime"),
}


def plan_vllm(
    artifact: Artifact, stage: str, record: Path | None, *, vllm_python: str | None = None, against: Path | None = None,
    form: ServingForm | None = None, devices: int = 1,
) -> Plan:  # fmt: skip
    """Plan a command that runs an export in vLLM and writes a record next to it.

    Args:
        artifact: the export.
        stage: validate, bench, serve-check or serve.
        record: where the record would be written; None if none is.
        vllm_python: Python interpreter of vLLM's environment; found automatically when None.
        against: the export's parent, if the command reads it.
        form: the serving options; dtype and cache affect the plan.
        devices: number of devices that compute the model on this machine.
    """
    copies, itemsize = 1, _ITEMSIZES.get("" if form is None else form.dtype, 2)
    if stage == "validate":
        copies, itemsize = _PARITY_COPIES, 4
    hardware, missing = _vllm_here(vllm_python, devices)
    peak, note = None, "vLLM takes the share of the GPU's memory that it is given; weights take what they take in files"
    if hardware == "a CPU":
        cache = (form.kv_cache_gib if form is not None and form.kv_cache_gib else 1) << 30
        peak = int(devices * (_VLLM_BYTES + cache) + copies * itemsize * _weights(artifact))
        note = (
            f"memory of vLLM on a CPU is estimated to within about 20 %: itself, a cache of {format_bytes(cache)}"
            f"{f', {devices} times,' if devices > 1 else ','} "
            f"and all weights {'twice' if copies > 1 else 'once'} in {8 * itemsize} bits"
        )
    return _plan(
        artifact, record, peak, missing, (against,), hardware=hardware,
        packages=("vllm, in an environment of its own",),
        note=note,
    )  # fmt: skip


def plan_tasks(artifact: Artifact, config: EvaluateConfig, *, vllm_python: str | None = None) -> Plan:
    """Plan `evaluate`; see `plan_vllm`. In torch, memory is not estimated: it does not grow with the model."""
    record, others = measure_path(artifact.root, "evaluate"), tuple(map(Path, config.against))
    lacking = missing_packages(("lm-eval",))
    if config.engine == "transformers":
        note = "the weights are in memory a part at a time, about 1 GiB in fp32"
        return _plan(artifact, record, None, lacking, others, packages=("lm-eval",), note=note)
    plan = plan_vllm(artifact, "evaluate", record, vllm_python=vllm_python, form=config)
    reads, packages = (*plan.reads, *config.against), ("lm-eval", *plan.packages)
    return dataclasses.replace(plan, reads=reads, packages=packages, missing=(*lacking, *plan.missing))


def plan_onnx(
    artifact: Artifact, stage: str, record: Path | None, *, against: Path | None = None, images: Path | None = None
) -> Plan:
    """Plan a command that runs an export in ONNX Runtime and writes a record next to it.

    The model of `against` is run on images of zeros, to measure its memory. For the arguments see `plan_vllm`; `images`
    is the folder of images that the command would read.

    Raises:
        BadArtifactError: `against` is not a valid artifact.
    """
    missing = missing_packages(_PACKAGES)
    peak = None if missing else _own_peak(artifact, _ONNX_MODULES[stage], against=against)
    return _plan(artifact, record, peak, missing, (against, images), packages=_PACKAGES)


def plan_tensorrt(
    artifact: Artifact, stage: str, record: Path | None, *, against: Path | None = None, device: str = "auto"
) -> Plan:
    """Plan a command on a TensorRT export, whose engines run only on a GPU; `device` does not affect the estimate.

    For the other arguments see `plan_vllm`.
    """
    missing = missing_packages(_PACKAGES)
    peak = None if missing else _own_peak(artifact, ("validation.tensorrt.validate",))
    hardware = "a CPU to check the export; a GPU to run its engines"
    return _plan(artifact, record, peak, missing, (against,), packages=_PACKAGES, hardware=hardware)


def _plan(
    artifact: Artifact, record: Path | None, peak: int | None, missing: tuple[Missing, ...],
    reads: Sequence[Path | None], *, packages: tuple[str, ...], hardware: str = "a CPU",
    note: str = "memory: packages measured here, copies of the weights counted",
) -> Plan:  # fmt: skip
    return Plan(
        reads=(f"{artifact.root} ({artifact.kind})", *(str(path) for path in reads if path is not None)),
        writes=() if record is None else (str(record),),
        peak_memory_bytes=peak,
        disk_bytes=0 if record is None else RECORD_BYTES,
        output_bytes=0 if record is None else RECORD_BYTES,
        hardware=hardware,
        packages=packages,
        missing=(*missing, *missing_memory(peak, "free memory")),
        notes=(note,),
        facts={"export_bytes": artifact.size_bytes},
    )


def _own_peak(artifact: Artifact, modules: Sequence[str], *, against: Path | None = None) -> int | None:
    """Estimate peak resident memory, bytes: imported modules, a forward pass of `against`, and copies of the weights.

    None if memory cannot be measured on this system.
    """
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
    """Bytes of all linear weights in fp32, from the shapes in the manifest; at least the size of the files."""
    linears = sum(4 * math.prod(layer.shape) for layer in artifact.manifest.layers if layer.shape)
    return max(linears, artifact.size_bytes)


def _weights(artifact: Artifact) -> int:
    """The number of weights in the export's files, without scales, from their headers."""
    files = [artifact.root / entry.path for entry in artifact.manifest.files if entry.path.endswith(".safetensors")]
    entries = {name: entry for file in files for name, entry in header_entries(file).items()}
    return sum(math.prod(entry.shape) for name, entry in entries.items() if not is_scale(name, entries))


def _vllm_here(vllm_python: str | None, devices: int) -> tuple[str, tuple[Missing, ...]]:
    """The hardware that the installed vLLM was built for, and what this machine lacks to run it on so many devices."""
    hardware = "a CPU"
    try:
        environment = inspect_environment(find_vllm_python(vllm_python))
        hardware = hardware if environment.on_cpu else "a GPU"
        require_known_device(environment)
        require_devices(environment, devices)
    except MissingCapabilityError as error:
        return hardware, (Missing(f"{error.what}: {error.why}", error.fix),)
    return hardware, ()
