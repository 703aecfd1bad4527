"""Selecting the device that a command computes on: `--device` is resolved here for all commands.

`auto` selects a GPU if there is one that supports the work, and logs which device was selected and why. If a GPU was
requested explicitly and cannot be used, an error is raised before any model is loaded.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, Self, TypeVar

from fp8pipe.core import machine
from fp8pipe.core.errors import MissingCapabilityError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "DEVICES", "DEVICE_HELP", "Device", "DeviceName", "GpuNeed", "current_device", "has_kernels", "lack_of",
    "no_gpu", "on_device", "parts_on", "resolve_device", "say", "to_device",
    "use_own_gpu",
]  # fmt: skip

_LOG = logging.getLogger(__name__)
DeviceName = Literal["auto", "cpu", "cuda"]
DEVICES: Final[tuple[DeviceName, ...]] = ("auto", "cpu", "cuda")
DEVICE_HELP: Final = "Where to compute; auto: on a GPU that can, else on the CPU."
_OTHERWISE: Final = "or use --device cpu"


@dataclass(frozen=True, slots=True)
class GpuNeed:
    """What a workload requires of a GPU."""

    work: str  # name of the workload for messages, for instance falqon
    capability: tuple[int, int] | None = None  # minimum compute capability; None: any that torch has kernels for
    reason: str = ""  # what requires that capability

    def __str__(self) -> str:
        if self.capability is None:
            return "a CUDA GPU"
        return f"a CUDA GPU of compute capability {_dotted(self.capability)} or newer ({self.reason})"


@dataclass(frozen=True, slots=True)
class Device:
    """The selected device."""

    name: Literal["cpu", "cuda"]
    reason: str  # why it was selected

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


class Placed(Protocol):
    """A configuration of a workload that runs on a CPU or a GPU."""

    @property
    def device(self) -> DeviceName:
        """The requested device."""

    @property
    def gpu_need(self) -> GpuNeed:
        """What the workload requires of a GPU."""

    def model_copy(self, *, update: dict[str, Any]) -> Self:
        """A copy with some fields changed."""


T = TypeVar("T", bound=Placed)


def resolve_device(asked: DeviceName, need: GpuNeed) -> Device:
    """Select the device for a workload with the requirements `need`, without logging.

    Raises:
        MissingCapabilityError: a GPU was requested, and none is available that supports the workload.
    """
    if asked == "cpu":
        return Device("cpu", "as requested")
    gpu = next(iter(machine.gpus()), None)
    why, fix = no_gpu() if gpu is None else lack_of(gpu, need)
    if gpu is not None and not why:
        return Device("cuda", f"{gpu.name}, compute capability {_dotted(gpu.capability)}")
    if asked == "auto":
        return Device("cpu", why)
    what = "no GPU is usable" if gpu is None else f"{gpu.name} cannot run {need.work}"
    raise MissingCapabilityError(what, why=why, fix=f"{fix}, {_OTHERWISE}")


def on_device(config: T) -> T:
    """`config` with the selected device; logs the device if it was `auto`.

    Raises:
        MissingCapabilityError: as `resolve_device`.
    """
    found = resolve_device(config.device, config.gpu_need)
    say(config.device, found)
    return config.model_copy(update={"device": found.name})


def current_device(config: Placed) -> DeviceName:
    """The device that `config` would run on, without logging; an explicit choice is returned without checking it."""
    return resolve_device("auto", config.gpu_need).name if config.device == "auto" else config.device


def use_own_gpu(number: int) -> torch.device:
    """Let this process compute on the GPU with its number among the processes of its machine; returns that GPU.

    Raises:
        MissingCapabilityError: this machine has fewer GPUs.
    """
    import torch

    count = torch.cuda.device_count()
    if number >= count:
        raise MissingCapabilityError(
            f"there are more processes on this machine than its {count} GPU(s)",
            why=f"this one is number {number + 1}, and each needs a GPU of its own",
            fix=f"start at most {count} (--nproc-per-node {count})",
        )
    own = torch.device("cuda", number)
    torch.cuda.set_device(own)
    return own


def say(asked: DeviceName, found: Device) -> None:
    """Log which device `auto` selected; an explicit choice is not logged."""
    if asked == "auto":
        _LOG.info("device: %s", found)


def lack_of(gpu: machine.Gpu, need: GpuNeed) -> tuple[str, str]:
    """Why a GPU does not support a workload, and what the user can do; two empty strings if it does."""
    if need.capability is not None and gpu.capability < need.capability:
        least = f"{_dotted(need.capability)} ({need.reason})"
        return f"compute capability {_dotted(gpu.capability)}; {need.work} needs {least}", "use a newer GPU"
    import torch

    built = torch.cuda.get_arch_list()
    if built and not has_kernels(gpu.capability, built):
        why = f"this torch has no kernels for compute capability {_dotted(gpu.capability)}: it has {' '.join(built)}"
        return why, "install a build of torch that has them"
    return "", ""


def has_kernels(capability: tuple[int, int], built: Collection[str]) -> bool:
    """Whether a GPU runs code built for any of these architectures (torch's names: `sm_90`, `sm_90a`, `compute_120`).

    Machine code (`sm`) runs on GPUs of the same major version with the same or a later minor version, or with suffix
    `a` only on that exact version; PTX (`compute`) runs on all later ones.
    """
    for name in built:
        found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
        if found is None:
            continue
        kind, version, suffix = found[1], (int(found[2]), int(found[3])), found[4]
        if suffix == "a" or capability < version:
            runs = capability == version
        else:
            runs = (kind == "compute" and not suffix) or capability[0] == version[0]
        if runs:
            return True
    return False


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to `device`; copies to a GPU are asynchronous, from pinned memory."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def parts_on(tensor: Tensor, size: int, device: torch.device) -> Iterator[Tensor]:
    """Split a host tensor into parts of at most `size` rows, and copy each to `device` as it is requested."""
    return (to_device(part, device) for part in tensor.split(size))


def no_gpu() -> tuple[str, str]:
    """Why torch sees no GPU, and what the user can do."""
    version = machine.distribution_version("torch")
    if version is None:
        return "torch is not installed", "install a CUDA build of torch"
    if "+rocm" in version:
        return "torch is a build for ROCm", "install a CUDA build of torch on a machine with an NVIDIA GPU"
    if "+cpu" in version or _cpu_build():
        return "torch is a CPU build", "install a CUDA build of torch on a machine with an NVIDIA GPU"
    why = "torch sees no GPU: none is there, CUDA_VISIBLE_DEVICES hides it, or the driver is missing or too old"
    return why, "see what nvidia-smi shows"


def _cpu_build() -> bool:
    import torch

    return torch.version.cuda is None


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
