"""The environment of the measurements: machine, GPU, driver, clocks, memory, and versions of the packages."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any, Final

import torch

from fp8pipe.core.machine import describe_machine, distribution_version
from fp8pipe.numerics.backends import library
from gpu_parts.context import Context, LeftOut
from pipeline.dry_run.devices import device_reported

_ASKED: Final = (
    "driver_version", "clocks.max.sm", "clocks.max.memory", "clocks.sm", "clocks.memory", "power.limit", "power.draw",
    "temperature.gpu", "pstate", "utilization.gpu", "memory.used",
)  # fmt: skip
_PACKAGES: Final = ("torch", "triton", "transformers", "pydantic", "peft", "bitsandbytes", "timm")


def run(context: Context) -> None:
    """Emit the rows of this part."""
    context.row("machine", describe_machine)
    context.row("packages", lambda: {name: distribution_version(name) for name in _PACKAGES})
    context.row("torch", lambda: _torch(context))
    context.row("gpu", lambda: _gpu(context))
    context.row("state", lambda: gpu_state(context))


def _torch(context: Context) -> dict[str, Any]:
    return {
        "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "threads": torch.get_num_threads(),
        "compiled_cpu_casts": library() is not None,
    }  # fmt: skip


def _gpu(context: Context) -> dict[str, Any]:
    if not context.on_cuda:
        raise LeftOut("measuring on a CPU")
    found = torch.cuda.get_device_properties(context.device)
    free, total = torch.cuda.mem_get_info(context.device)
    sheet = device_reported(found.name)
    return {
        "gpu": found.name, "capability": f"{found.major}.{found.minor}", "processors": found.multi_processor_count,
        "memory_bytes": total, "free_bytes": free, "l2_bytes": getattr(found, "L2_cache_size", None),
        "data_sheet": None if sheet is None else sheet.name,
    }  # fmt: skip


def gpu_state(context: Context) -> dict[str, Any]:
    """Current driver version, clocks, power and temperature, as reported by nvidia-smi.

    Raises:
        LeftOut: the device is a CPU, or nvidia-smi is not installed.
    """
    if not context.on_cuda or shutil.which("nvidia-smi") is None:
        raise LeftOut("nvidia-smi is not installed")
    command = ["nvidia-smi", f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    return dict(zip(_ASKED, (value.strip() for value in done.stdout.split(",")), strict=True))
