"""The dry run of an export to vLLM: what would be written and what it takes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from exporters.vllm.dry_run import dry_run_export
from exporters.vllm.export import plan_export, plan_warnings
from exporters.vllm.options import VllmExportOptions
from fp8pipe.core.disk import free_bytes
from fp8pipe.core.plan import Plan, missing_disk, missing_memory
from fp8pipe.models.checkpoint.sidecars import SERVED_FILES, sidecar_files


def plan_vllm(source: Path, output: Path, options: VllmExportOptions) -> tuple[dict[str, Any], Plan]:
    """The dry run: what would be written and what it takes; of the weights nothing is read, so nothing is linted."""

    plan = plan_export(source, options)
    free, took = free_bytes(output), dry_run_export(plan)
    converted = sum(layer.converted for layer in plan.layers)
    root = plan.source.root
    written = plan.payload_bytes + sum((root / name).stat().st_size for name in sidecar_files(root, SERVED_FILES))
    document = {
        "source": str(source),
        "source_kind": str(plan.source.kind),
        "output": str(output),
        "output_exists": output.exists(),
        "format": str(options.format),
        "shards": list(plan.shard_names()),
        "need_bytes": plan.payload_bytes,
        "free_bytes": free,
        "fits": free >= plan.payload_bytes,
        "layer_counts": {"converted": converted, "skipped": len(plan.layers) - converted},
        "warnings": plan_warnings(plan),
        "serving_hardware": _hardware(options),
    }
    actions = Counter(str(unit.action) for unit in plan.units)
    shown = Plan(
        reads=(f"{source} ({document['source_kind']})",),
        writes=(f"{output}{' (exists; needs --force)' if output.exists() and not options.force else ''}",),
        peak_memory_bytes=took.peak_bytes,
        disk_bytes=written,
        output_bytes=written,
        seconds=took.seconds,
        missing=(*missing_disk(output, written), *missing_memory(took.peak_bytes, "free memory")),
        notes=(*plan_warnings(plan), "memory and time from the largest tensor of each kind, with made-up values"),
        facts={
            "format": str(options.format),
            "files": len(plan.shards),
            "layers": f"{converted} in FP8, {len(plan.layers) - converted} not",
            "tensors": ", ".join(f"{count} {action}" for action, count in sorted(actions.items())),
            "to_serve": document["serving_hardware"],
        },
    )
    return document, shown


def _hardware(options: VllmExportOptions) -> str:
    """What serving this format takes."""
    if str(options.format) == "bf16":
        return "any device vLLM runs on"
    if str(options.format) == "w8a16":
        return "a GPU of compute capability 8.0 or later, or a CPU with this project's vLLM plugin"
    return "a GPU of compute capability 8.9 or later, or a CPU with this project's vLLM plugin"
