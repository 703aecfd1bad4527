"""The dry run of `fp8pipe export --target onnx` and of `--target trt` for a vision model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from exporters.onnx.options import OnnxExportOptions

__all__ = ["vision_plan"]

_BLOCK_LINEARS: Final = 4  # qkv, projection and the two of the MLP


def vision_plan(
    source: Path, output: Path, options: OnnxExportOptions, *, engines: Sequence[str] | None = None, base: str = "",
    pack: bool = True,
) -> tuple[dict[str, Any], str]:  # fmt: skip
    """The dry run of a vision model: the artifact is read and linted, nothing of it is traced.

    Args:
        source: the artifact.
        output: where the export would go.
        options: of the graph.
        engines: compute capabilities to compile for; None for ONNX Runtime, which needs none.
        base: of engines, the type of what is not quantized.
        pack: whether engines are stored compressed.
    """
    from exporters.onnx.export import plan_export
    from exporters.tensorrt.size import expected_sizes
    from fp8pipe.core.disk import free_bytes
    from fp8pipe.core.plan import Plan, missing_disk, missing_memory, missing_packages

    plan = plan_export(source, options, runtime=engines is None)
    free = free_bytes(output)
    precision = plan.precision if engines is None else f"{plan.precision}, {base} base"
    document = {
        "source": str(source),
        "output": str(output),
        "output_exists": output.exists(),
        "format": str(options.format),
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
    blocks = (len(plan.weights) + len(plan.float_layers)) // _BLOCK_LINEARS
    most, written = expected_sizes(plan.need_bytes, blocks, len(engines or ()), pack=pack, halves=plan.halves)
    shown = Plan(
        reads=(str(source),),
        writes=(f"{output}{' (exists; needs --force)' if output.exists() and not options.force else ''}",),
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
    return {**document, "plan": shown.document()}, shown.text()
