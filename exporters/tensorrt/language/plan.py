"""Plan an export of a language model (`--dry-run`) from file headers and the manifest."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any, Final

from exporters.tensorrt.engines import expected_sizes
from exporters.tensorrt.language.calibrate import BATCH
from exporters.tensorrt.language.source import holds_nvfp4
from exporters.tensorrt.language.target import WHOLE_BYTES, CalibrationOptions, LanguageExportOptions
from exporters.tensorrt.target import TrtFormat
from exporters.text import LENGTH
from exporters.vllm.export import plan_export
from exporters.vllm.options import VllmExportOptions
from exporters.vllm.plan import Action, ExportPlan, Unit
from fp8pipe.artifact import open_artifact
from fp8pipe.artifact.kinds import FALQON_KIND
from fp8pipe.core.machine import free_bytes, resident_bytes
from fp8pipe.core.plan import Missing, Plan, missing_disk, missing_memory, missing_packages

# Peak memory, as a number of fp32 copies of what lies outside of the decoder layers (embedding, head) and of the
# largest layer: the reference model, a part of the written graph as read back and in float32, and its session; and of
# the logits: those of the session, numpy and torch. A small file also runs as a whole: one copy of all weights. Fitted
# to two runs (see docs/planning.md). A checkpoint is written tensor by tensor, with only the reference in memory.
_OUTSIDE_COPIES: Final = 4.0
_LAYER_COPIES: Final = 4.0
_CHECKPOINT_COPIES: Final = 1.5
_LOGITS_COPIES: Final = 4.7


def plan_for_people(
    source: Path, output: Path, options: LanguageExportOptions | CalibrationOptions
) -> tuple[dict[str, Any], Plan]:
    """Plan an export from headers and manifests, without hashing, linting, calibrating or tracing.

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
    plan, free = plan_export(source, VllmExportOptions(), verify=False), free_bytes(output)
    artifact = open_artifact(source, kind=FALQON_KIND, verify=False)
    config, shape = artifact.manifest.config, plan.source.config
    own = TrtFormat.NVFP4_WEIGHT_ONLY if holds_nvfp4(artifact) else TrtFormat.FP8
    graph = isinstance(options, LanguageExportOptions)
    engines: tuple[str, ...] = ()
    if isinstance(options, LanguageExportOptions) and options.builder == "rtx":
        engines = options.capabilities(own)
    named = options.calibration_data or config.get("data")
    text = None if named is None else str(named)
    need = sum(unit.entry.size_bytes for unit in plan.units)
    written, _ = expected_sizes(need, shape.get("num_hidden_layers", 0), len(engines), pack=False, halves=False)
    peak, how = _peak_memory(plan, int(config.get("sequence_length", LENGTH)), graph)
    quantized = sum(unit.action is Action.CODES for unit in plan.units)
    others = sum(not layer.converted for layer in plan.layers)
    format = str(getattr(options, "format", None) or own)
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
            "layers": f"{quantized} in {'NVFP4' if own.weight_only else 'FP8'}, {others} float",
            "calibration": f"{text or 'none: give --calibration-data'}"
            + ("" if own.weight_only else f" ({options.calibration})"),
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
    if not graph:
        floats = sum(map(_float_bytes, plan.units))
        how = f"{_CHECKPOINT_COPIES:g} copies of all weights in fp32, plus what the process holds now"
        return resident_bytes() + int(_CHECKPOINT_COPIES * floats), f"memory is estimated: {how}"
    layers: Counter[str] = Counter()
    for unit in plan.units:
        layers[_layer(unit.name or unit.entry.name)] += _float_bytes(unit)
    outside, largest = layers.pop("", 0), max(layers.values(), default=0)
    logits = BATCH * length * plan.source.config.get("vocab_size", 0) * 4
    small = sum(unit.entry.size_bytes for unit in plan.units) <= WHOLE_BYTES
    whole = outside + layers.total() if small else 0
    note = (
        f"memory is estimated: {_OUTSIDE_COPIES:g} copies of embedding and head in fp32, {_LAYER_COPIES:g} of a layer, "
        f"{_LOGITS_COPIES:g} of the logits of {BATCH} texts, plus what the process holds now; a model whose "
        "layers do not run one by one takes five copies of all weights"
    )
    return (
        resident_bytes() + int(_OUTSIDE_COPIES * outside + _LAYER_COPIES * largest + whole + _LOGITS_COPIES * logits),
        note,
    )


def _float_bytes(unit: Unit) -> int:
    """Bytes of a tensor in fp32."""
    return 4 * math.prod(unit.entry.shape)


def _layer(name: str) -> str:
    """The layer that a tensor belongs to: its name up to the first number; empty if there is none."""
    parts = name.split(".")
    first = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    return "" if first is None else ".".join(parts[: first + 1])
