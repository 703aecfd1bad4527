"""Plan an export of a language model (`--dry-run`) from file headers and the manifest."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

from exporters.tensorrt.engines import expected_sizes
from exporters.tensorrt.language.calibrate import BATCH
from exporters.tensorrt.language.source import LENGTH
from exporters.tensorrt.language.target import CalibrationOptions, LanguageExportOptions
from exporters.vllm.export import plan_export
from exporters.vllm.options import VllmExportOptions
from exporters.vllm.plan import Action, ExportPlan
from fp8pipe.artifact import open_artifact
from fp8pipe.artifact.kinds import FALQON_KIND
from fp8pipe.core.machine import free_bytes, resident_bytes
from fp8pipe.core.plan import Missing, Plan, missing_disk, missing_memory, missing_packages

# Peak memory, as a number of fp32 copies of all weights and of the logits. Copies of the weights are those of the
# reference model, of the written graph as read back, and of ONNX Runtime's session with dequantized weights; copies of
# the logits are those of the session, numpy and torch. The numbers were fitted to one run (SmolLM2). A checkpoint is
# written tensor by tensor, with only the reference model in memory.
_GRAPH_COPIES: Final = 5.0
_CHECKPOINT_COPIES: Final = 1.5
_LOGITS_COPIES: Final = 4.7


def plan_for_people(
    source: Path, output: Path, options: LanguageExportOptions | CalibrationOptions
) -> tuple[dict[str, Any], Plan]:
    """Plan an export from headers and manifests, without linting, calibrating or tracing.

    Args:
        source: the artifact to export.
        output: the directory of the export.
        options: the options of a graph export or of a checkpoint export.

    Returns:
        The plan as a JSON document, and as a `Plan` for people.

    Raises:
        ConfigurationError: the source cannot be used.
        BadArtifactError: the artifact is unfinished or damaged.
    """
    plan, free = plan_export(source, VllmExportOptions()), free_bytes(output)
    config, shape = open_artifact(source, kind=FALQON_KIND, verify=False).manifest.config, plan.source.config
    graph = isinstance(options, LanguageExportOptions)
    engines: tuple[str, ...] = ()
    if isinstance(options, LanguageExportOptions) and options.builder == "rtx":
        engines = options.compute_capabilities
    named = options.calibration_data or config.get("data")
    text = None if named is None else str(named)
    need = sum(unit.entry.size_bytes for unit in plan.units)
    written, _ = expected_sizes(need, shape.get("num_hidden_layers", 0), len(engines), pack=False, halves=False)
    peak, how = _peak_memory(plan, int(config.get("sequence_length", LENGTH)), graph)
    quantized = sum(unit.action is Action.CODES for unit in plan.units)
    others, format = sum(not layer.converted for layer in plan.layers), str(getattr(options, "format", ""))
    document = {
        "source": str(source), "output": str(output), "output_exists": output.exists(), "format": format,
        "calibration_data": text, "need_bytes": need, "free_bytes": free, "fits": free >= need,
        "layer_counts": {"quantized": quantized, "float": others}, "engines": list(engines),
    }  # fmt: skip
    packages = (
        *(("onnx", "onnx-ir", "onnxscript", "onnxruntime") if graph else ()),
        *(("tensorrt-rtx",) if engines else ()),
    )
    no_text = Missing("no text to calibrate on", "give --calibration-data")
    force = getattr(options, "force", False)
    shown = Plan(
        reads=(str(source), *((text,) if text else ())),
        writes=(f"{output}{' (exists; needs --force)' if output.exists() and not force else ''}",),
        peak_memory_bytes=peak,
        disk_bytes=written,
        output_bytes=written,
        packages=packages,
        missing=(*(() if text else (no_text,)), *missing_packages(packages), *missing_disk(output, written),
                 *missing_memory(peak, "a machine with more memory, or a smaller model")),
        notes=(
            how,
            *(("engines are compiled in a separate process, whose memory is not included",) if engines else ()),
        ),
        facts={
            "format": format,
            "layers": f"{quantized} in FP8, {others} float",
            "calibration": f"{text or 'none: give --calibration-data'} ({options.calibration})",
            "engines": ", ".join(engines) or "none",
        },
    )  # fmt: skip
    return document, shown


def _peak_memory(plan: ExportPlan, length: int, graph: bool) -> tuple[int, str]:
    """Estimate the peak host memory.

    Args:
        plan: the tensors of the model.
        length: maximum number of tokens per text.
        graph: whether a graph is exported; otherwise a checkpoint.

    Returns:
        The memory in bytes, and a note on how it was estimated.
    """
    copies = _GRAPH_COPIES if graph else _CHECKPOINT_COPIES
    logits = BATCH * length * plan.source.config.get("vocab_size", 0) * 4 if graph else 0
    floats = 4 * sum(math.prod(unit.entry.shape) for unit in plan.units)
    scored = f", {_LOGITS_COPIES:g} of the logits of {BATCH} texts" if graph else ""
    note = f"memory is estimated: {copies:g} copies of all weights in fp32{scored}, plus what the process holds now"
    return resident_bytes() + int(copies * floats + _LOGITS_COPIES * logits), note
