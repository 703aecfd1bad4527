"""What an export of a language model would write, from headers and the manifest: for dry runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from exporters.tensorrt.language.options import CalibrationOptions, LanguageExportOptions
from exporters.tensorrt.language.perplexity import BATCH
from exporters.tensorrt.language.source import LENGTH
from exporters.tensorrt.size import expected_sizes
from exporters.vllm.export import plan_export
from exporters.vllm.options import VllmExportOptions
from exporters.vllm.plan import Action
from fp8pipe.artifact import open_artifact
from fp8pipe.artifact.kinds import FALQON_KIND
from fp8pipe.core.machine import free_bytes, resident_bytes
from fp8pipe.core.plan import Missing, Plan, missing_disk, missing_memory, missing_packages

__all__ = ["LanguagePlan", "plan_language"]

# fp32 copies of all weights that live at once: the reference that is compared with, the written graph as read again,
# and ONNX Runtime's session with what it dequantizes; and of the logits: the session's, numpy's and torch's. Fitted to
# the phases of one run (SmolLM2). A checkpoint is written tensor by tensor beside the reference alone.
_GRAPH_COPIES: Final = 5.0
_CHECKPOINT_COPIES: Final = 1.5
_LOGITS_COPIES: Final = 4.7


@dataclass(frozen=True, slots=True)
class LanguagePlan:
    """A dry run's answer.

    Attributes:
        layers: linears with FP8 codes.
        others: linears without.
        text: what scales would be measured on; none where nothing is named.
        need_bytes: of codes and float tensors, once; engines are not in it.
        disk_bytes: with engines.
        engines: compute capabilities to compile for.
        working_bytes: that live at once at the worst moment, beside what is loaded now.
        reckoned: how `working_bytes` was had, in words.
    """

    layers: int
    others: int
    text: str | None
    need_bytes: int
    disk_bytes: int
    engines: tuple[str, ...]
    working_bytes: int
    reckoned: str


def plan_language(source: Path, options: LanguageExportOptions | CalibrationOptions) -> LanguagePlan:
    """Plan an export; headers and the manifest are read, no weights.

    Raises:
        ConfigurationError: a source that cannot be used.
        BadArtifactError: an unfinished or corrupt artifact.
    """
    plan = plan_export(source, VllmExportOptions())
    artifact = open_artifact(source, kind=FALQON_KIND, verify=False)
    converted = [unit for unit in plan.units if unit.action is Action.CODES]
    graph = isinstance(options, LanguageExportOptions)
    text = options.calibration_data or artifact.manifest.config.get("data")
    need = sum(unit.entry.size_bytes for unit in plan.units)
    engines = (
        options.compute_capabilities if isinstance(options, LanguageExportOptions) and options.builder == "rtx" else ()
    )
    shape = plan.source.config
    disk, _ = expected_sizes(need, shape.get("num_hidden_layers", 0), len(engines), pack=False, halves=False)
    copies = _GRAPH_COPIES if graph else _CHECKPOINT_COPIES
    length = int(artifact.manifest.config.get("sequence_length", LENGTH))
    logits = BATCH * length * shape.get("vocab_size", 0) * 4 if graph else 0
    floats = 4 * sum(math.prod(unit.entry.shape) for unit in plan.units)
    scored = f", {_LOGITS_COPIES:g} of the logits of {BATCH} texts" if graph else ""
    return LanguagePlan(
        layers=len(converted),
        others=sum(not layer.converted for layer in plan.layers),
        text=None if text is None else str(text),
        need_bytes=need,
        disk_bytes=disk,
        engines=engines,
        working_bytes=int(copies * floats + _LOGITS_COPIES * logits),
        reckoned=f"{copies:g} copies of all weights in fp32{scored}, beside what is loaded now",
    )


def plan_for_people(
    source: Path, output: Path, options: LanguageExportOptions | CalibrationOptions
) -> tuple[dict[str, Any], Plan]:
    """The dry run: headers and manifests are read; nothing is linted, calibrated or traced."""

    plan, free = plan_language(source, options), free_bytes(output)
    document = {
        "source": str(source),
        "output": str(output),
        "output_exists": output.exists(),
        "format": str(getattr(options, "format", "")),
        "calibration_data": plan.text,
        "need_bytes": plan.need_bytes,
        "free_bytes": free,
        "fits": free >= plan.need_bytes,
        "layer_counts": {"quantized": plan.layers, "float": plan.others},
        "engines": list(plan.engines),
    }
    graph = isinstance(options, LanguageExportOptions)
    peak = resident_bytes() + plan.working_bytes
    packages = (
        *(("onnx", "onnx-ir", "onnxscript", "onnxruntime") if graph else ()),
        *(("tensorrt-rtx",) if plan.engines else ()),
    )
    written = plan.disk_bytes
    no_text = Missing("no text is named to calibrate on", "give --calibration-data")
    force = getattr(options, "force", False)
    shown = Plan(
        reads=(str(source), *((plan.text,) if plan.text else ())),
        writes=(f"{output}{' (exists; needs --force)' if output.exists() and not force else ''}",),
        peak_memory_bytes=peak,
        disk_bytes=written,
        output_bytes=written,
        packages=packages,
        missing=(*(() if plan.text else (no_text,)), *missing_packages(packages), *missing_disk(output, written),
                 *missing_memory(peak, "a machine with more memory, or a smaller model")),
        notes=(
            f"memory is reckoned: {plan.reckoned}",
            *(("engines are compiled by a process of its own, whose memory is not predicted",) if plan.engines else ()),
        ),
        facts={
            "format": str(getattr(options, "format", "")),
            "layers": f"{plan.layers} in FP8, {plan.others} float",
            "calibration": f"{plan.text or 'no text is named: give --calibration-data'} ({options.calibration})",
            "engines": ", ".join(plan.engines) or "none",
        },
    )  # fmt: skip
    return document, shown
