"""Properties of this machine: processor features, memory, disk space, GPUs and installed packages.

`disk_guard` checks disk space before a command writes files, and reports a full disk with needed and free bytes (exit
code 15).
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fp8pipe.core.errors import OutOfMemoryError

# The processor features that determine which low-precision kernels a CPU can run, from narrow to wide vectors.
CPU_FEATURES = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16",
    "amx_fp16",
)  # fmt: skip
_CPUINFO = Path("/proc/cpuinfo")
# The lowest compute capability with FP8 tensor cores (Ada); Hopper is 9.0.
FP8_CAPABILITY = (8, 9)


@dataclass(frozen=True, slots=True)
class Gpu:
    """One CUDA device."""

    name: str
    capability: tuple[int, int]  # (major, minor) compute capability
    memory_bytes: int  # total

    @property
    def fp8(self) -> bool:
        """Whether the GPU has FP8 tensor cores."""
        return self.capability >= FP8_CAPABILITY


def cpu_features(cpuinfo: Path = _CPUINFO) -> list[str]:
    """The `CPU_FEATURES` that the processor has according to `cpuinfo`; empty if that file does not exist."""
    flags = set(_proc_field(cpuinfo, "flags").split())
    return [name for name in CPU_FEATURES if name in flags]


def cpu_model(cpuinfo: Path = _CPUINFO) -> str:
    """The processor's name."""
    return _proc_field(cpuinfo, "model name") or platform.processor() or platform.machine()


def memory_bytes() -> int:
    """Total physical memory in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_bytes() -> int:
    """Memory in bytes that can be allocated now without swapping; the total if the system does not report it."""
    return _field_bytes("MemAvailable", memory_bytes())


def swap_bytes() -> int:
    """Total swap space in bytes; 0 if the system does not report it."""
    return _field_bytes("SwapTotal", 0)


def resident_bytes() -> int:
    """Peak resident memory of this process so far, in bytes."""
    import resource

    # Elsewhere than on Linux ru_maxrss, which in a process that was forked may be what its parent held.
    if peak := _proc_field(Path("/proc/self/status"), "VmHWM"):
        return int(peak.split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def current_bytes() -> int:
    """Resident memory of this process now, in bytes; 0 if the system does not report it."""
    found = _proc_field(Path("/proc/self/status"), "VmRSS")
    return int(found.split()[0]) * 1024 if found else 0


def return_freed_memory() -> None:
    """Give memory that is free within the C library's heap back to the system, where that library can (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def describe_machine() -> dict[str, str | int | list[str]]:
    """Description of this machine as plain data, to be stored with measurements; imports no large library."""
    return {
        "processor": cpu_model(), "cores": len(os.sched_getaffinity(0)), "features": cpu_features(),
        "memory_bytes": memory_bytes(), "system": platform.platform(),
    }  # fmt: skip


def driver_gpus() -> int:
    """Number of GPUs that NVIDIA's driver makes visible to this process (0 without a driver), found without torch."""
    import ctypes

    try:
        driver = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    return count.value if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 else 0


def gpus() -> list[Gpu]:
    """CUDA devices that torch can use; imports torch only if the driver reports a GPU."""
    if not driver_gpus():
        return []
    import torch

    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        found.append(Gpu(properties.name, (properties.major, properties.minor), properties.total_memory))
    return found


def distribution_version(name: str) -> str | None:
    """Version of a distribution, without importing it; None if it is not installed."""
    from importlib import metadata  # imported here to keep `--help` fast

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def format_bytes(size: int) -> str:
    """Format a number of bytes with a decimal unit, like `1.2 GB`."""
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
    """The value in the first line of the form `name: value` of a file; empty if there is none."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in pairs if key.strip() == name), "")


_FULL = (errno.ENOSPC, errno.EDQUOT)
# safetensors is written in Rust, and raises an exception of its own with the system's message instead of an OSError.
_FULL_TEXTS = ("No space left on device", "Disk quota exceeded")


def free_bytes(path: Path) -> int:
    """Free disk space in bytes for this user on the file system of `path`, which need not exist yet."""
    here = Path(path).absolute()
    while not here.exists():
        here = here.parent
    return shutil.disk_usage(here).free


def ordinary_mode(root: Path) -> int:
    """Permission bits of a newly created file in the directory `root`: 0666 restricted by the umask."""
    scratch = root / ".mode"
    scratch.touch()  # reading the umask itself requires setting it, which affects all threads for a moment
    try:
        return scratch.stat().st_mode & 0o777
    finally:
        scratch.unlink()


def disk_guard(path: Path, need_bytes: int) -> AbstractContextManager[None]:
    """Check that `need_bytes` bytes are free at `path`, and return a context for writing them.

    The check takes place when the function is called. In the context, errors of a full disk are translated, see
    `translate_disk_full`.

    Raises:
        OutOfMemoryError: fewer bytes are free than needed; the message states both numbers.
    """
    free = free_bytes(path)
    if free < need_bytes:
        raise _full(path, need_bytes, free)
    return translate_disk_full(path, need_bytes)


@contextmanager
def translate_disk_full(path: Path, need_bytes: int | None = None) -> Iterator[None]:
    """A context in which errors of a full disk become an OutOfMemoryError (exit code 15).

    Args:
        path: where files are written.
        need_bytes: number of bytes needed, for the message; None if unknown.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise _full(path, need_bytes, free_bytes(path)) from error


def is_disk_full(error: BaseException) -> bool:
    """Whether an error means that a disk or a quota is full."""
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
    """Make waiting OpenMP threads spin only briefly, unless the environment sets this. Call before torch is imported.

    By default, threads that wait for work spin for so long that two busy processes on one machine slow each other down.
    If threads sleep at once (`OMP_WAIT_POLICY=passive`), they wake up too late for the short operations of a small
    model, so that a second core brings no gain. Spinning for some microseconds is a compromise. Measured on two cores,
    a step of image synthesis takes 0.29 s with spinning threads, 0.47 s with sleeping ones and 0.31 s with this
    setting; with two such runs in parallel, it takes 1.6 s, 0.52 s and 0.78 s.
    """
    if not any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")):
        os.environ["GOMP_SPINCOUNT"] = "5000"
