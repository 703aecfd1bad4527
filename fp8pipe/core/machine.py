"""What this machine is and has: processor features, memory, disk, GPUs and installed packages.

Disk space is asked for before writing, and a full disk is reported as one (exit 15) with both numbers.
"""

from __future__ import annotations

import errno
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fp8pipe.core.errors import OutOfMemoryError

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


def driver_gpus() -> int:
    """How many GPUs NVIDIA's driver shows this process, whatever torch is here; 0 without a driver."""
    import ctypes

    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def gpus() -> list[Gpu]:
    """CUDA devices that torch can use; imports torch only where the driver shows some."""
    if not driver_gpus():
        return []
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


_FULL = (errno.ENOSPC, errno.EDQUOT)
# safetensors writes from Rust and reports the system's text instead of raising OSError.
_FULL_TEXTS = ("No space left on device", "Disk quota exceeded")


def free_bytes(path: Path) -> int:
    """Bytes free to this user on the file system that holds `path`, which need not exist yet."""
    here = Path(path).absolute()
    while not here.exists():
        here = here.parent
    return shutil.disk_usage(here).free


def ordinary_mode(root: Path) -> int:
    """Permission bits of a file that is plainly created in `root`: 0666 less the umask."""
    scratch = root / ".mode"
    scratch.touch()  # asking for the umask itself would change it for a moment, for all threads
    try:
        return scratch.stat().st_mode & 0o777
    finally:
        scratch.unlink()


def disk_guard(path: Path, need_bytes: int) -> AbstractContextManager[None]:
    """Refuse now if `need_bytes` do not fit at `path`; as a context manager, also translate a full disk.

    Raises:
        OutOfMemoryError: less is free than is needed; the message holds both numbers.
    """
    free = free_bytes(path)
    if free < need_bytes:
        raise _full(path, need_bytes, free)
    return translate_disk_full(path, need_bytes)


@contextmanager
def translate_disk_full(path: Path, need_bytes: int | None = None) -> Iterator[None]:
    """Turn "no space left on device" raised inside into an OutOfMemoryError (exit 15); `need_bytes` where known."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise _full(path, need_bytes, free_bytes(path)) from error


def is_disk_full(error: BaseException) -> bool:
    """Whether `error` says that a disk or a quota is full."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _FULL
    return type(error).__name__ == "SafetensorError" and any(text in str(error) for text in _FULL_TEXTS)


def _full(path: Path, need_bytes: int | None, free: int) -> OutOfMemoryError:
    need = "an unknown number of bytes" if need_bytes is None else f"{need_bytes} bytes"
    return OutOfMemoryError(
        f"the disk that holds {path} is full",
        why=f"needed {need}, {free} bytes are free",
        fix="free space, or give an output directory on another disk",
    )


def wait_briefly() -> None:
    """Let OpenMP threads spin only shortly, unless the environment decides otherwise. Call before torch loads OpenMP.

    Threads spin while they wait for the next piece of work, long enough that two busy processes on one machine starve
    each other. Put to sleep at once (`OMP_WAIT_POLICY=passive`) they wake too late for a small model's short
    operations, and a second core then gains nothing. Spinning for some microseconds is the middle: measured on two
    cores, a step of image synthesis takes 0.29 s with threads that spin, 0.47 s with threads that sleep and 0.31 s like
    this; with two such runs side by side it takes 1.6 s, 0.52 s and 0.78 s.
    """
    if not any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")):
        os.environ["GOMP_SPINCOUNT"] = "5000"
