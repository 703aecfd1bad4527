"""The device that an installed vLLM computes on, as seen by vLLM's own torch.

fp8pipe's torch may be a CPU build while vLLM is a GPU build, so vLLM's own Python is queried. vLLM's kernels depend on
the GPU's compute capability. So a validation record names the GPU, and is not accepted for serving on another one.
"""

from __future__ import annotations

import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Final

from exporters.vllm.environment import VllmEnvironment, subprocess_environment
from fp8pipe.core.errors import MissingCapabilityError
from fp8pipe.core.machine import Gpu

__all__ = ["device_in_words", "require_devices", "require_known_device", "vllm_gpu"]

_TIMEOUT_S: Final = 120  # importing torch from a cold disk takes long
_ASK: Final = """
import json, torch
count = torch.cuda.device_count() if torch.cuda.is_available() else 0
found = [torch.cuda.get_device_properties(index) for index in range(count)]
print(json.dumps([[one.name, [one.major, one.minor], one.total_memory] for one in found]))
"""


def vllm_gpu(environment: VllmEnvironment) -> Gpu | None:
    """The GPU that this vLLM computes on, which is the first one that its torch sees; None if it is not a CUDA build.

    Raises:
        MissingCapabilityError: it is a CUDA build, but finds no GPU.
    """
    if environment.device != "cuda":
        return None
    found, said = _gpus(environment.python)
    if not found:
        raise MissingCapabilityError(
            f"the vLLM installed for {environment.python} is a build for GPUs, but it finds no GPU",
            why=said or "its torch sees no CUDA device: no GPU, no driver, or CUDA_VISIBLE_DEVICES hides it",
            fix="run this on a machine with a GPU; or make vLLM's environment for CPUs (make setup-vllm) and name its "
            "Python with --vllm-python",
        )
    return found[0]


def require_devices(environment: VllmEnvironment, count: int) -> None:
    """Refuse to start vLLM on more GPUs than it would find here. On a CPU, devices are processes.

    Raises:
        MissingCapabilityError: fewer than `count` GPUs; or the errors of `vllm_gpu`.
    """
    if vllm_gpu(environment) is None:
        return
    found, _ = _gpus(environment.python)
    if len(found) < count:
        raise MissingCapabilityError(
            f"{count} GPUs are needed on this node, and the torch of {environment.python} sees {len(found)}",
            why=f"it sees {', '.join(gpu.name for gpu in found)}",
            fix="give a smaller --tensor-parallel-size or --pipeline-parallel-size, or more nodes (--nnodes); see also "
            "CUDA_VISIBLE_DEVICES",
        )


def require_known_device(environment: VllmEnvironment) -> None:
    """Refuse a vLLM whose kernels fp8pipe does not know, since its validation would have no meaning.

    Raises:
        MissingCapabilityError: it is built for devices other than CPUs and NVIDIA GPUs, or for CUDA and finds no GPU.
    """
    if vllm_gpu(environment) is None and not environment.on_cpu:
        raise MissingCapabilityError(
            f"the vLLM installed for {environment.python} is a build for {environment.device}",
            why="fp8pipe does not know its kernels, only those for NVIDIA GPUs and for CPUs",
            fix="use a vLLM for CUDA, or make one for CPUs (make setup-vllm) and name its Python with --vllm-python",
        )


def device_in_words(environment: VllmEnvironment) -> str:
    """A description of the device for messages and records. Raises the errors of `vllm_gpu`.

    For example `a CPU`, or `a GPU (NVIDIA H200, compute capability 9.0)`.
    """
    gpu = vllm_gpu(environment)
    if gpu is None:
        return "a CPU" if environment.on_cpu else f"a device of {environment.device}"
    return f"a GPU ({gpu.name}, compute capability {'.'.join(map(str, gpu.capability))})"


@cache
def _gpus(python: Path) -> tuple[list[Gpu], str]:
    """The GPUs that vLLM's torch sees, and its own explanation if it sees none."""
    command = [str(python), "-P", "-c", _ASK]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, env=subprocess_environment()
        )
        devices = json.loads(done.stdout) if done.returncode == 0 else []
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return [], f"its torch could not be run: {error}"
    said = f"its torch says: {done.stderr.strip().rpartition(chr(10))[2]}" if done.returncode else ""
    return [Gpu(name, (major, minor), memory) for name, (major, minor), memory in devices], said
