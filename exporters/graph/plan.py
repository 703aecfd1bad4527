"""The dry run of exports of vision models as graphs.

Tracing the model itself would take as long as exporting it. So a network of two layers is traced, which loads all the
packages that an export loads; the artifact's model is run on as many images as the export compares; and the memory for
the copies of its weights that exist at the same time is added.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from exporters.graph.images import PROBE_IMAGES
from exporters.graph.runtime import import_onnx_package, open_session
from exporters.graph.trace import export_program
from fp8pipe.core.machine import free_bytes
from fp8pipe.core.plan import PhaseMeter, Plan, can_measure, missing_disk, missing_memory, missing_packages
from fp8pipe.models.vision.quantized import QuantizedVit


@dataclass(frozen=True, slots=True)
class GraphPlan:
    """What an export would write."""

    weights: tuple[str, ...]  # layers whose weights are stored as codes
    activations: tuple[str, ...]  # sites that are quantized
    float_layers: tuple[str, ...]  # linears that stay float
    need_bytes: int  # total size of stored tensors, bytes
    precision: str  # a description, for example "8-bit int weights, quantized activations"
    halves: bool  # whether codes of at most 4 bits are stored one per byte
    peak_bytes: int | None = None  # peak resident memory of an export in this process; None if unknown


def vision_plan(
    plan: GraphPlan, source: Path, output: Path, *, format: str, force: bool, engines: Sequence[str] | None = None,
    base: str = "", sizes: tuple[int, int] | None = None,
) -> tuple[dict[str, Any], Plan]:  # fmt: skip
    """The dry run of an export of a vision model; returns it as a JSON document and as a plan to print.

    `plan` was made from the artifact, which has been read and linted; the model is not traced. `engines` are the
    compute capabilities to compile for, None for ONNX Runtime, which needs no engines; `base` is the dtype of
    everything that is not quantized. `sizes` are the peak and final size of the export in bytes, by default the size of
    the graph.
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
    notes = [
        "peak memory: packages and forward passes were measured on this machine; copies of the weights were added up"
    ]
    if engines:
        notes.append(
            "engines are compiled in a separate process; its memory and time are not included in these figures"
        )
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


# fp32 copies of all weights at the peak, besides the artifact's own model: the models that are traced and compared, the
# graph, its serialized float form, the written file and ONNX Runtime's sessions. See docs/planning.md.
COPIES: Final = 6.0
_LAYER_IMAGES: Final = 4


def export_peak(quantized: QuantizedVit) -> int | None:
    """Estimate the peak resident memory of an export in this process, bytes; None if it cannot be measured here."""
    if not can_measure():
        return None
    with PhaseMeter() as meter:
        meter.enter("packages")
        _trace_two_layers()
        meter.enter("forward")
        run_model(quantized)
    floats = sum(4 * tensor.numel() for tensor in quantized.model.state_dict().values())
    return max(phase.peak_bytes for phase in meter.phases.values()) + int(COPIES * floats)


def _trace_two_layers() -> None:
    # Trace and run a tiny network, which loads every package that an export loads.
    import_onnx_package("onnxruntime")
    net = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).eval()
    dynamic = ({0: torch.export.Dim("batch")},)
    model = export_program(
        net, (torch.zeros(2, 8),), dynamic, "a two-layer test network", "install torch and onnx again"
    )
    import onnx_ir as ir

    open_session(ir.to_proto(model).SerializeToString())


@torch.no_grad()
def run_model(quantized: QuantizedVit) -> None:
    """Run the forward passes that an export and its validation run, on blank images, to measure their memory."""
    height, width = quantized.structure.image_size
    pixels = torch.zeros(PROBE_IMAGES, 3, height, width)
    passes: tuple[Callable[[Tensor], Any], ...] = (lambda x: quantized.taps(x[:_LAYER_IMAGES]), quantized)
    for run in passes:
        run(pixels)
