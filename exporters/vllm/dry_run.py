"""What an export takes, measured on a part of it: the largest tensor of each kind, with made-up values.

An export holds one tensor at a time, so its peak of memory is that of its largest one. The same code runs here as in
the export, on tensors of the same shapes; of the model itself nothing but headers is read.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from exporters.vllm.auxiliary import write_auxiliary
from exporters.vllm.lint import lint
from exporters.vllm.plan import Action, ExportPlan, Unit
from exporters.vllm.reopen import reopen
from exporters.vllm.writer import write_weights
from fp8pipe.core.phases import PhaseMeter, can_measure
from fp8pipe.models.checkpoint.tensors import DTYPES, TensorEntry, header_entries


@dataclasses.dataclass(frozen=True, slots=True)
class DryRun:
    """What an export takes.

    Attributes:
        peak_bytes: largest resident memory of this process; None where the system does not tell it.
        seconds: wall time of all tensors.
    """

    peak_bytes: int | None
    seconds: float


def dry_run_export(plan: ExportPlan) -> DryRun:
    """Lint, write and reopen the largest tensor of each action in a scratch folder."""
    largest: dict[Action, Unit] = {}
    for unit in plan.units:
        known = largest.get(unit.action)
        if known is None or unit.entry.size_bytes > known.entry.size_bytes:
            largest[unit.action] = unit
    with tempfile.TemporaryDirectory(prefix="fp8pipe-dry-run-") as scratch:
        root = Path(scratch)
        units = tuple(_made_up(unit, root / f"{unit.action}.safetensors") for unit in largest.values())
        # An empty root: the adapter beside the real weights is not read either.
        (root / "source").mkdir()
        source = dataclasses.replace(plan.source, root=root / "source")
        small = dataclasses.replace(plan, source=source, shards=(units,), dropped=(), orphans=())
        started = time.perf_counter()
        peak = _run(small, root / "export")
        seconds = time.perf_counter() - started
    done = sum(unit.entry.size_bytes for unit in units)
    everything = sum(unit.entry.size_bytes for unit in plan.units)
    return DryRun(peak, seconds * everything / max(done, 1))


def _run(plan: ExportPlan, root: Path) -> int | None:
    root.mkdir()
    if not can_measure():
        _export(plan, root)
        return None
    with PhaseMeter() as meter:
        meter.enter("export")
        _export(plan, root)
    return meter.phases["export"].peak_bytes


def _export(plan: ExportPlan, root: Path) -> None:
    lint(plan)
    write_weights(plan, root)
    write_auxiliary(plan, root)
    reopen(plan, root)


def _made_up(unit: Unit, file: Path) -> Unit:
    """The unit with random values in a file of its own."""
    tensors = {unit.entry.name: _values(unit.entry)}
    if unit.scale is not None:
        tensors[unit.scale.name] = _values(unit.scale).abs() + 1
    save_file(tensors, file)
    del tensors
    entries = header_entries(file)
    scale = None if unit.scale is None else entries[unit.scale.name]
    return dataclasses.replace(unit, entry=entries[unit.entry.name], scale=scale)


def _values(entry: TensorEntry) -> torch.Tensor:
    dtype = DTYPES[entry.dtype]
    if not dtype.is_floating_point:
        return torch.zeros(entry.shape, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    # Written in bf16 first: a copy in fp32 would raise the very peak that is to be measured.
    return torch.randn(entry.shape, generator=generator, dtype=torch.bfloat16).to(dtype)
