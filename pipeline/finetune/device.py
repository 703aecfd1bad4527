"""Which device each method needs: FP8 tensor cores are FALQON's need alone, its baselines compute in bf16."""

from __future__ import annotations

import torch

from fp8pipe.core.errors import MissingCapabilityError

_FP8, _BF16 = (8, 9), (8, 0)


def least_capability(method: str) -> tuple[int, int]:
    """The CUDA compute capability at which `method` (falqon, lora, qlora) begins to run as it is meant to."""
    return _FP8 if method == "falqon" else _BF16


def hardware(method: str, device: str) -> str:
    """What a run needs, in words."""
    if device == "cpu":
        return "a CPU"
    major, minor = least_capability(method)
    why = "FP8" if method == "falqon" else "bf16"
    return f"a CUDA GPU of compute capability {major}.{minor} or newer ({why})"


def check_device(device: str, method: str = "falqon") -> None:
    """Refuse a device that is not there.

    Raises:
        MissingCapabilityError: CUDA asked for and absent, or too old for the method.
    """
    if device == "cpu":
        return
    if not torch.cuda.is_available():
        raise MissingCapabilityError(
            "no CUDA device is available", why="torch.cuda.is_available() is false", fix="use --device cpu"
        )
    capability, least = torch.cuda.get_device_capability(), least_capability(method)
    if capability < least:
        raise MissingCapabilityError(
            f"{torch.cuda.get_device_name()} cannot run {method}",
            why=f"its compute capability is {capability[0]}.{capability[1]}; {method} needs {hardware(method, device)}",
            fix="use a newer GPU, or --device cpu",
        )
