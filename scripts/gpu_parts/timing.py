"""Measures time, peak memory, kernels and host synchronizations of work on a device."""

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
    """Measure the time of one call: median, minimum and maximum over several rounds.

    On CUDA, the time is measured between two events of the stream, and the device is idle between rounds. On a CPU, it
    is measured with the clock.

    Args:
        work: the function to measure.
        device: the device that it uses.
        rounds: number of measured rounds.
        warmup: number of rounds before them that are not measured.
        calls: calls of `work` per round, for work that is too short to be measured alone.

    Returns:
        `seconds`, `least` and `most`: time per call, seconds; `rounds`; `host_seconds`: median time per call until the
        host has queued the work.
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
    """Run one round; returns the seconds that the device and the host took for all calls together."""
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
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Restart the measurement of peak allocated memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Peak memory allocated for tensors since `reset_peak`, bytes; None on a CPU, where torch does not count it."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def heaviest(work: Callable[[], object], device: torch.device, count: int = 20) -> dict[str, Any]:
    """Profile one call with torch's profiler.

    Returns:
        `launched`: number of kernels that ran (operators on a CPU); `busy_seconds`: their total time; `kernels`: name,
        calls and seconds of the `count` kernels that took longest.
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
    """Within the `with` block, collect the source lines at which torch makes the host wait for the GPU.

    As detected by `torch.cuda.set_sync_debug_mode`, these are reads of values, copies to pageable memory, and sizes
    that depend on values. The list is filled when the block ends; on a CPU it stays empty.
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
