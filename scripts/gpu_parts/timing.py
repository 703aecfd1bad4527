"""How long work takes on a device, how much memory it held, and how often the host waited for it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def timed(
    work: Callable[[], object], device: torch.device, *, rounds: int, warmup: int = 2, calls: int = 1
) -> dict[str, Any]:
    """Seconds of one call: median, least and most over rounds.

    On CUDA between two events of the stream, each round ending with the device idle; elsewhere by the clock.

    Args:
        work: what is measured.
        device: where it runs.
        rounds: measured ones.
        warmup: rounds before them.
        calls: of `work` in a round, for work that is too short to be measured alone.

    Returns:
        `seconds`, `least`, `most` of a call; `rounds`; `host_seconds`, the median time until the host had queued it.
    """
    found, queued = [], []
    for number in range(warmup + rounds):
        taken, host = _round(work, device, calls)
        if number >= warmup:
            found.append(taken / calls)
            queued.append(host / calls)
    return {
        "seconds": median(found), "least": min(found), "most": max(found), "rounds": rounds,
        "host_seconds": median(queued),
    }  # fmt: skip


def _round(work: Callable[[], object], device: torch.device, calls: int) -> tuple[float, float]:
    """Seconds on the device and of the host, all calls together."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
    synchronize(device)
    began = time.perf_counter()
    if events:
        events[0].record()
    for _ in range(calls):
        work()
    if events:
        events[1].record()
    host = time.perf_counter() - began
    synchronize(device)
    return (events[0].elapsed_time(events[1]) / 1000 if events else host), host


def synchronize(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Count the peak of allocated memory from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Most bytes that tensors held at once since `reset_peak`; None where torch does not count them."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def heaviest(work: Callable[[], object], device: torch.device, count: int = 20) -> dict[str, Any]:
    """What a call spends its time on, as torch's profiler sees it.

    Returns:
        `launched`, how many kernels ran (operators on a CPU); `busy_seconds`, the time of all of them; and `kernels`,
        the `count` that took longest: name, calls, seconds.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler:
        work()
        synchronize(device)
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    seen = [one for one in profiler.key_averages() if one.device_type == kind]
    figure = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    found = sorted(((one.key, one.count, getattr(one, figure) / 1e6) for one in seen), key=lambda one: -one[2])
    kernels = [{"kernel": name[:120], "calls": calls, "seconds": seconds} for name, calls, seconds in found[:count]]
    return {
        "launched": sum(calls for _, calls, _ in found), "busy_seconds": sum(taken for *_, taken in found),
        "kernels": kernels,
    }  # fmt: skip


@contextmanager
def counted_syncs(device: torch.device) -> Iterator[list[str]]:
    """While active, gather where torch makes the host wait for the GPU; empty on a CPU, where nothing waits.

    These are reads of values, copies to pageable memory, and sizes that depend on values, as
    `torch.cuda.set_sync_debug_mode` finds them. The list is complete when the context has ended.
    """
    places: list[str] = []
    if device.type != "cuda":
        yield places
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode(before)
    places += [f"{one.filename}:{one.lineno}" for one in said if "synchronizing CUDA operation" in str(one.message)]
