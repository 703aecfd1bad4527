"""The dry run: predicts the output of an export from headers, and its time and memory by running a small part of it.

The part is some rows of the largest tensor of each action, with random values. An export holds a few blocks of rows at
a time, and the same code runs here on enough rows for many blocks.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from safetensors.torch import save_file

from exporters.vllm.export import plan_export
from exporters.vllm.inputs import read_calibration, with_inputs
from exporters.vllm.lint import lint_structure
from exporters.vllm.nvfp4 import with_global_scales
from exporters.vllm.options import ExportFormat, VllmExportOptions
from exporters.vllm.plan import Action, ExportPlan, Unit
from exporters.vllm.reopen import reopen
from exporters.vllm.warnings import plan_warnings
from exporters.vllm.writer import CONFIG_NAME, write_auxiliary, write_weights
from fp8pipe.artifact import sha256_file
from fp8pipe.artifact.finding import refuse
from fp8pipe.core.machine import free_bytes
from fp8pipe.core.plan import PhaseMeter, Plan, can_measure, missing_disk, missing_memory
from fp8pipe.models.checkpoint.sidecars import SERVED_FILES, sidecar_bytes
from fp8pipe.models.checkpoint.tensors import DTYPES, TensorEntry, TensorHeader, header_entries, shard_names
from fp8pipe.numerics.blocks import block_grid

_HARDWARE = {
    ExportFormat.FP8: "a GPU of compute capability 8.9 or later, or a CPU with this project's vLLM plugin",
    ExportFormat.FP8_BLOCK: "a GPU of compute capability 8.9 or later, or a CPU with this project's vLLM plugin",
    ExportFormat.W8A16: "a GPU of compute capability 8.0 or later, or a CPU with this project's vLLM plugin",
    ExportFormat.NVFP4: "a GPU of compute capability 7.5 or later, or a CPU with this project's vLLM plugin",
    ExportFormat.NVFP4_W4A4: "a GPU of compute capability 10.0 or later (vLLM does not round inputs on older ones), or "
    "a CPU with this project's vLLM plugin",
    ExportFormat.BF16: "any device vLLM runs on",
}
_HOW: Final = (
    "memory and time are measured on rows of the largest tensor of each kind, with random values: memory to within "
    "about 20 %, time to within a factor of two if files are as fast as in the system's temporary directory"
)
_CALIBRATION: Final = "calibration is not in it: the model in fp32, a part in memory at a time, on {} record(s)"
_ALIGNED: Final = 128
H = TypeVar("H", bound=TensorHeader)
_ROWS_BYTES: Final = 1 << 25  # of a tensor, in the source's dtype: some sixty blocks


def plan_vllm(source: Path, output: Path, options: VllmExportOptions) -> tuple[dict[str, Any], Plan]:
    """The dry run, as a JSON document and as a plan; no weights are read, so the linter does not check their values.

    Raises:
        LintRefusedError: names or shapes rule the export out.
        ConfigurationError, BadArtifactError: see `plan_export`.
    """
    plan = plan_export(source, options, verify=False)
    refuse(lint_structure(plan), str(plan.source.root))
    text = read_calibration(plan)
    free, (peak, seconds) = free_bytes(output), measure(plan)
    converted = sum(layer.converted for layer in plan.layers)
    written = plan.payload_bytes + sidecar_bytes(plan.source.root, SERVED_FILES)
    document = {
        "source": str(source),
        "source_kind": str(plan.source.kind),
        "output": str(output),
        "output_exists": output.exists(),
        "format": str(options.format),
        "shards": list(shard_names(len(plan.shards))),
        "need_bytes": plan.payload_bytes,
        "free_bytes": free,
        "fits": free >= plan.payload_bytes,
        "layer_counts": {"converted": converted, "skipped": len(plan.layers) - converted},
        "warnings": plan_warnings(plan),
        "serving_hardware": _HARDWARE[options.format],
    }
    actions, name = Counter(str(unit.action) for unit in plan.units), "NVFP4" if options.format.packed else "FP8"
    shown = Plan(
        reads=(f"{source} ({document['source_kind']})",),
        writes=(f"{output}{' (exists; needs --force)' if output.exists() and not options.force else ''}",),
        peak_memory_bytes=peak,
        disk_bytes=written,
        output_bytes=written,
        seconds=seconds,
        missing=(*missing_disk(output, written), *missing_memory(peak, "free memory")),
        notes=(*plan_warnings(plan), _HOW, *([] if text is None else [_CALIBRATION.format(text[0].records)])),
        facts={
            "format": str(options.format),
            "files": len(plan.shards),
            "layers": f"{converted} in {name}, {len(plan.layers) - converted} not",
            "tensors": ", ".join(f"{count} {action}" for action, count in sorted(actions.items())),
            "to_serve": document["serving_hardware"],
        },
    )
    return document, shown


def measure(plan: ExportPlan) -> tuple[int | None, float]:
    """Lint, write, reopen and hash rows of the largest tensor of each action in a temporary folder.

    Returns:
        Peak resident memory of this process in bytes, None if the system does not report it; and the estimated time for
        all tensors in seconds.
    """
    largest: dict[Action, Unit] = {}
    for unit in sorted(plan.units, key=lambda unit: -unit.entry.size_bytes):
        largest.setdefault(unit.action, unit)
    with tempfile.TemporaryDirectory(prefix="fp8pipe-dry-run-") as scratch:
        root = Path(scratch)
        parts = {action: _some_rows(unit) for action, unit in largest.items()}
        units = tuple(_made_up(unit, root / f"{action}.safetensors") for action, unit in parts.items())
        # A separate root, so that the adapter beside the real weights is not read either.
        (root / "source").mkdir()
        shutil.copyfile(plan.source.root / CONFIG_NAME, root / "source" / CONFIG_NAME)
        (root / "export").mkdir()
        source = replace(plan.source, root=root / "source")
        small = replace(plan, source=source, shards=(units,), dropped=(), orphans=())
        started = time.perf_counter()
        with PhaseMeter() if can_measure() else nullcontext() as meter:
            if meter is not None:
                meter.enter("export")
            small = with_global_scales(small)
            small = with_inputs(small, dict.fromkeys((unit.entry.name for unit in units), 1.0), None)
            write_weights(small, root / "export")
            write_auxiliary(small, root / "export")
            reopen(small, root / "export")
            for file in (*root.glob("*.safetensors"), *(root / "export").glob("*.safetensors")):
                sha256_file(file)
        seconds = time.perf_counter() - started
    done, everything = (sum(unit.entry.size_bytes for unit in some) for some in (units, plan.units))
    peak = None if meter is None else meter.phases["export"].peak_bytes
    return peak, seconds * everything / max(done, 1)


def _some_rows(unit: Unit) -> Unit:
    """The unit with only its first rows, if it is processed in blocks of rows and has many."""
    shape = unit.entry.shape
    rows = _ROWS_BYTES // max(1, unit.entry.size_bytes // max(1, shape[0] if shape else 1)) // _ALIGNED * _ALIGNED
    per_row = unit.scale is None or unit.scale.shape[:1] in ((), (1,), shape[:1])
    if unit.transposed or not per_row or not 0 < rows < (shape[0] if shape else 1):
        return unit

    def cut(header: H) -> H:
        return replace(header, shape=(rows, *header.shape[1:])) if header.shape[:1] == shape[:1] else header

    scale, outputs = None if unit.scale is None else cut(unit.scale), [cut(output) for output in unit.outputs]
    if unit.block is not None:
        outputs[1] = replace(outputs[1], shape=block_grid(outputs[0].shape, unit.block))
    return replace(unit, entry=cut(unit.entry), scale=scale, outputs=tuple(outputs))


def _made_up(unit: Unit, file: Path) -> Unit:
    """A copy of the unit whose tensor and scale have random values and are stored in `file`."""
    tensors = {unit.entry.name: _values(unit.entry)}
    if unit.scale is not None:
        tensors[unit.scale.name] = _values(unit.scale).abs() + 1
    save_file(tensors, file)
    del tensors
    entries = header_entries(file)
    scale = None if unit.scale is None else entries[unit.scale.name]
    return replace(unit, entry=entries[unit.entry.name], scale=scale)


def _values(entry: TensorEntry) -> torch.Tensor:
    dtype = DTYPES[entry.dtype]
    if not dtype.is_floating_point:
        return torch.zeros(entry.shape, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    # Generated in bf16: a copy in fp32 would raise the peak memory that is being measured.
    return torch.randn(entry.shape, generator=generator, dtype=torch.bfloat16).to(dtype)
