"""Estimates the disk space of a fine-tuning run: its checkpoints, and the artifact that it writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from pipeline.dry_run.workload import Workload

_HEADER: Final = 150  # bytes of a safetensors header per tensor
_RECORD: Final = 650  # bytes of the manifest per linear layer
_PLOT: Final = 60_000  # the loss curves as PNG


@dataclass(frozen=True, slots=True)
class DiskNeed:
    """Bytes on the disk: the most at any one time, and the finished artifact."""

    most: int
    output: int


def disk_need(
    work: Workload, *, shards: Mapping[str, int], tensors: int, sidecars: int, saves: int, kept: int, moments: int
) -> DiskNeed:
    """The disk space of a run.

    Args:
        work: its shapes.
        shards: bytes of tensors in each weight file of the output.
        tensors: number of tensors in the base checkpoint.
        sidecars: bytes of tokenizer and configuration files.
        saves: number of checkpoints written.
        kept: number of checkpoints kept.
        moments: bytes of the optimizer's moments per trained value.
    """
    falqon = work.method == "falqon"
    layers = sum(len(group.outs) for group in work.groups)
    a = work.rank * sum(group.width for group in work.groups)
    adapter = a + 4 * work.trained if falqon else 0
    records = _HEADER * (tensors + 2 * layers) + _RECORD * layers + _PLOT
    output = sum(shards.values()) + adapter + sidecars + records
    base = work.codes + work.directions if falqon else 0
    step = (4 + moments) * work.trained + (work.codes if work.flushes else 0)
    # Deployed weights are collected in files next to the checkpoints: codes, or merged bf16 weights.
    spilled = (1 if work.method == "falqon" else 2) * work.weights if work.processes > 1 else 0
    training = base + min(saves, kept + 1) * step
    return DiskNeed(max(training, base + min(saves, kept) * step + spilled + output), output)
