"""What this machine is: processor features, memory, GPUs and installed packages."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "CPU_FEATURES", "Gpu", "available_bytes", "cpu_features", "cpu_model", "describe_machine", "distribution_version",
    "format_bytes", "gpus", "memory_bytes", "resident_bytes", "swap_bytes",
]  # fmt: skip

# The features that decide which low-precision kernels a CPU can run, narrowest first.
CPU_FEATURES = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    "amx_fp16",
)  # fmt: skip
_CPUINFO = Path("/proc/cpuinfo")
# First with FP8 tensor cores (Ada); Hopper is 9.0.
FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One CUDA device."""

    name: str
    capability: tuple[int, int]  # (major, minor) compute capability
    memory_bytes: int  # in all

    @property
    def fp8(self) -> bool:
        """Whether it has FP8 tensor cores."""
        return self.capability >= FP8_CAPABILITY


def cpu_features(cpuinfo: Path = _CPUINFO) -> list[str]:
    """Those of `CPU_FEATURES` that the processor reports; empty where the file does not exist."""
    flags = set(_proc_field(cpuinfo, "flags").split())
    return [name for name in CPU_FEATURES if name in flags]


def cpu_model(cpuinfo: Path = _CPUINFO) -> str:
    """The processor's name."""
    return _proc_field(cpuinfo, "model name") or platform.processor() or platform.machine()


def memory_bytes() -> int:
    """Physical memory, bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_bytes() -> int:
    """Memory that could be taken now without swapping, bytes; all of it where the system does not say."""
    return _field_bytes("MemAvailable", memory_bytes())


def swap_bytes() -> int:
    """Swap space, bytes; none where the system does not say."""
    return _field_bytes("SwapTotal", 0)


def resident_bytes() -> int:
    """Largest resident memory of this process so far, bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def describe_machine() -> dict[str, str | int | list[str]]:
    """What a record keeps of the machine its figures come from; imports nothing heavy."""
    return {
        "processor": cpu_model(), "cores": len(os.sched_getaffinity(0)), "features": cpu_features(),
        "memory_bytes": memory_bytes(), "system": platform.platform(),
    }  # fmt: skip


def gpus() -> list[Gpu]:
    """CUDA devices that torch can use; imports torch."""
    import torch

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found.append(Gpu(properties.name, (properties.major, properties.minor), properties.total_memory))
    return found


def distribution_version(name: str) -> str | None:
    """Version of an installed distribution, imported never; None where it is not installed."""
    from importlib import metadata  # here, so that help does not wait for it

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def format_bytes(size: int) -> str:
    """Bytes with a decimal unit: `1.2 GB`."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.4g} TB"


def _field_bytes(name: str, otherwise: int) -> int:
    value = _proc_field(Path("/proc/meminfo"), name)
    return int(value.split()[0]) * 1024 if value else otherwise


def _proc_field(path: Path, name: str) -> str:
    """The first value of `name: value`; empty where there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in pairs if key.strip() == name), "")
