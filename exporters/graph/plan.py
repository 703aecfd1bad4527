"""The dry run of exports of vision models as graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8pipe.core.machine import free_bytes
from fp8pipe.core.plan import Plan, missing_disk, missing_memory, missing_packages

__all__ = ["GraphPlan", "vision_plan"]


@dataclass(frozen=True, slots=True)
class GraphPlan:
    """What an export would write.

    Attributes:
        weights: layers whose weights are stored as codes.
        activations: sites that are quantized.
        float_layers: linears that stay float.
        need_bytes: size of all stored tensors, bytes.
        precision: in words, for instance "int4 weights, int8 activations".
        halves: whether codes of at most 4 bits lie in bytes of their own.
        peak_bytes: largest resident memory of an export by this process; None where it cannot be told.
    """

    weights: tuple[str, ...]
    activations: tuple[str, ...]
    float_layers: tuple[str, ...]
    need_bytes: int
    precision: str
    halves: bool
    peak_bytes: int | None = None


def vision_plan(
    plan: GraphPlan, source: Path, output: Path, *, format: str, force: bool, engines: Sequence[str] | None = None,
    base: str = "", sizes: tuple[int, int] | None = None,
) -> tuple[dict[str, Any], Plan]:  # fmt: skip
    """The dry run of an export of a vision model: the artifact was read and linted, nothing of it is traced.

    Args:
        plan: what the graph would hold.
        source: the artifact.
        output: where the export would go.
        format: of the export.
        force: whether an existing output is replaced.
        engines: compute capabilities to compile for; None for ONNX Runtime, which needs none.
        base: of engines, the type of what is not quantized.
        sizes: bytes of the export while it is made, and in the end; those of the graph when None.
    """

    free = free_bytes(output)
    precision = plan.precision if engines is None else f"{plan.precision}, {base} base"
    document = {
        "source": str(source),
        "output": str(output),
        "output_exists": output.exists(),
        "format": format,
        "precision": plan.precision,
        "need_bytes": plan.need_bytes,
        "free_bytes": free,
        "fits": free >= plan.need_bytes,
        "layer_counts": {"quantized": len(plan.weights), "float": len(plan.float_layers)},
        "activation_sites": len(plan.activations),
    }
    packages = ("onnx", "onnx-ir", "onnxscript", "onnxruntime", *(("tensorrt-rtx",) if engines else ()))
    notes = ["memory: packages and forward passes measured here, copies of the weights counted"]
    if engines:
        notes.append("engines are compiled by a process of its own, whose memory and time are not in these figures")
    most, written = sizes or (plan.need_bytes, plan.need_bytes)
    shown = Plan(
        reads=(str(source),),
        writes=(f"{output}{' (exists; needs --force)' if output.exists() and not force else ''}",),
        peak_memory_bytes=plan.peak_bytes,
        disk_bytes=most,
        output_bytes=written,
        packages=packages,
        missing=(*missing_packages(packages), *missing_disk(output, most),
                 *missing_memory(plan.peak_bytes, "free memory")),
        notes=tuple(notes),
        facts={
            "precision": precision,
            "layers": f"{len(plan.weights)} quantized, {len(plan.float_layers)} float",
            "activations": f"{len(plan.activations)} sites quantized",
            **({} if engines is None else {"engines": ", ".join(engines) or "none"}),
        },
    )  # fmt: skip
    return document, shown
