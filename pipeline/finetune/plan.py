"""Plan a fine-tuning run (`--dry-run`): layers from file headers, and memory, disk and time from small dry runs."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from fp8pipe.artifact.kinds import PackingFacts
from fp8pipe.core import machine
from fp8pipe.core.devices import resolve_device
from fp8pipe.core.plan import Plan, can_measure, missing_disk, missing_memory, missing_packages
from fp8pipe.models.checkpoint.names import checkpoint_names
from fp8pipe.models.checkpoint.sidecars import BASE_MODEL_FILES, sidecar_bytes
from fp8pipe.models.checkpoint.tensors import DTYPES, PLAIN_FLOATS, header_entries, weight_files
from fp8pipe.models.language.base import check_base
from fp8pipe.models.language.ending import read_ending
from fp8pipe.models.language.experts import unstack_experts
from fp8pipe.models.language.sources import ModelSource, resolve_model
from fp8pipe.models.language.structure import load_config, model_class
from pipeline.dry_run.costs import (
    LIVE,
    LIVE_COMPILED,
    LORA,
    MERGED,
    MERGED_COMPILED,
    QLORA,
    Decoder,
    Step,
    Way,
    estimate,
)
from pipeline.dry_run.devices import DEVICES, Device, device_reported
from pipeline.dry_run.language import layer_count, with_layers, write_model
from pipeline.dry_run.process import Scaled, dry_run
from pipeline.falqon.convert import read_convertible
from pipeline.falqon.flush import held_moments
from pipeline.falqon.rules import FinalMerge
from pipeline.finetune.config import FinetuneConfig
from pipeline.finetune.method import export_warnings
from pipeline.finetune.packing import packing_warning

_LOG = logging.getLogger(__name__)

# The larger dry run has a third of the model's layers, the smaller one a fifth of that, so that extrapolation does not
# amplify noise much. For a large model, the larger dry run has only as many layers as fit into this size.
_DRY_RUN_BYTES: Final = 1 << 30
_FP32_STATES: Final = 4  # fp32 values per trained parameter: itself, its gradient and AdamW's two moments
_PACKAGES: Final = {"falqon": (), "lora": ("peft",), "qlora": ("peft", "bitsandbytes")}
_PACKING: Final = {
    "positions": "several examples a row, kept apart by restarting positions",
    "mask": "several examples a row, kept apart by a mask per example",
    "off": "off: this model does not keep the examples of a row apart",
}
_NOT_PROBED: Final = "only if the model keeps the examples of a row apart, which is tested once it is loaded"
_SMALLER: Final = "a smaller --batch-size or --sequence-length, --gradient-checkpointing, or a smaller model"


def plan_finetune(config: FinetuneConfig, output: Path | None = None) -> Plan:
    """Plan a run from the headers of the model's files, the text, and dry runs with random weights.

    No weights are read. Without dry runs (for GPUs, or if a package is missing), memory and disk are estimated.

    Args:
        config: the resolved configuration.
        output: directory of the artifact; None if the user has not named one.

    Raises:
        ConfigurationError: the run itself would reject the model, the text or the rank.
        MissingCapabilityError: a GPU was requested, but none is available that supports the method.
    """
    device = resolve_device(config.device, config.gpu_need)
    config = config.model_copy(update={"device": device.name})
    source = resolve_model(config.model)
    check_base(source.path, config.model)
    settings = load_config(source.path)
    with torch.device("meta"):
        model = model_class(settings)._from_config(settings, dtype=getattr(torch, config.dtype))
    model.tie_weights()
    unstack_experts(model)
    structure = read_convertible(model, config.rank)
    names = checkpoint_names(source.path, structure.naming, structure.trainable)
    warnings = export_warnings(source.path, config.method, names.values())
    shapes = [structure.shape(name) for name in structure.trainable]
    missing = missing_packages(_packages(config))
    layer_bytes = 2 * sum(out * into for out, into in shapes) // layer_count(settings)
    if can_measure() and config.device == "cpu" and not missing:
        peak, disk, written, seconds, notes, packing = _measured(config, source, settings, layer_bytes)
    else:
        peak, disk, written, seconds, notes, packing = _estimated(config, model, shapes)
    on_gpus, told = _on_gpus(config, settings, shapes)
    where = output or Path(config.model).name
    return Plan(
        reads=(f"{config.model} ({source.path})", config.data),
        writes=(f"{where}", f"{where}.partial while it runs"),
        peak_memory_bytes=peak,
        disk_bytes=disk,
        output_bytes=written,
        seconds=seconds,
        hardware="a CPU" if config.device == "cpu" else str(config.gpu_need),
        packages=_packages(config),
        missing=(*missing, *missing_memory(peak, _SMALLER), *missing_disk(output or Path(), disk)),
        notes=(*warnings, *read_ending(source.path, tuned=True).warnings(), *notes, *told),
        facts={
            "device": str(device),
            "layers": len(shapes),
            "left_out": structure.left_out,
            "trainable": _adapter(config, shapes),
            "packing": packing if config.packing else "off, as asked",
            "steps": config.steps,
            "tokens": config.steps * config.gradient_accumulation * config.batch_size * config.sequence_length,
            **on_gpus,
        },
    )


def _packages(config: FinetuneConfig) -> tuple[str, ...]:
    eight_bits = ("bitsandbytes",) if config.optimizer == "adamw-8bit" else ()
    return tuple(dict.fromkeys((*_PACKAGES[config.method], *eight_bits)))


_Needs = tuple[int, int, int, float | None, tuple[str, ...], str]


def _layer_counts(layers: int, layer_bytes: int) -> tuple[int, ...]:
    """The number of decoder layers in each dry run, ascending; a single dry run with all layers if there are few.

    Args:
        layers: number of decoder layers of the model.
        layer_bytes: size of the linear weights of one decoder layer in bf16.
    """
    more = max(3, min(layers // 3, _DRY_RUN_BYTES // max(1, layer_bytes)))
    return (layers,) if layers <= more else (max(1, more // 5), more)


def _measured(config: FinetuneConfig, source: ModelSource, settings: Any, layer_bytes: int) -> _Needs:
    """Plan from dry runs with few layers, extrapolated to all layers.

    Returns:
        Peak memory, peak disk use and output size (bytes), time (seconds), notes, and a description of the packing.
    """
    layers = layer_count(settings)
    counts = _layer_counts(layers, layer_bytes)
    runs = []
    with tempfile.TemporaryDirectory(prefix="fp8pipe-dry-run-") as scratch:
        for count in counts:
            folder = Path(scratch) / f"{count}"
            write_model(with_layers(settings, count), _stored_dtype(source.path), folder / "model")
            job = {"config": config.model_dump(mode="json"), "base": str(source.path), "model": f"{folder / 'model'}"}
            runs.append((count, dry_run("pipeline.dry_run.language", job, folder)))
    scaled = Scaled(tuple(runs), layers)
    widths = [[int(width) for width in measured.facts["merged"]] for _, measured in runs]
    compensated = config.method == "falqon" and config.rule.final is FinalMerge.COMPENSATED
    held = [held_moments(few) for few in widths] if compensated else []
    real = held_moments(_with_all_layers(widths, counts, layers)) if compensated else 0
    peaks = [scaled.peak(name, held, real) if name == "final merge" else scaled.peak(name) for name in scaled.phases()]
    step, base = scaled.size("step"), scaled.size("kept")
    written = scaled.size("output") + sidecar_bytes(source.path, BASE_MODEL_FILES)
    saves = math.ceil(config.steps / config.save_every) if config.save_every else 1
    training = base + min(saves, config.keep_checkpoints + 1) * step
    in_the_end = base + min(saves, config.keep_checkpoints) * step + written
    packing = PackingFacts.model_validate(runs[-1][1].facts["packing"])
    warning = packing_warning(packing)
    notes = (
        f"memory, disk and time from dry runs with {' and '.join(map(str, counts))} of {layers} layers, "
        "random weights, and the largest of your batches",
        *((warning,) if warning else ()),
    )
    _LOG.debug("peaks by phase: %s", dict(zip(scaled.phases(), peaks, strict=True)))
    for count, measured in runs:
        _LOG.debug("%d layers: %s", count, measured.peaks)
    return max(peaks), max(training, in_the_end), written, _seconds(config, scaled, saves), notes, _PACKING[packing.how]


def _seconds(config: FinetuneConfig, scaled: Scaled, saves: int) -> float:
    facts = scaled.runs[-1][1].facts
    once = sum(scaled.seconds(name) for name in ("start", "text", "load", "prepare", "final merge", "write"))
    run = min(config.gradient_accumulation, 2)
    step: float = scaled.seconds("step", least=True) * config.gradient_accumulation / run * facts["train_share"]
    evaluations = 2 + (math.ceil(config.steps / config.evaluate_every) if config.evaluate_every else 1)
    evaluation: float = scaled.seconds("evaluate", least=True) * facts["heldout_batches"] * facts["heldout_share"]
    return once + config.steps * step + evaluations * evaluation + saves * scaled.seconds("save")


def _with_all_layers(widths: Sequence[list[int]], counts: Sequence[int], layers: int) -> list[int]:
    """`in_features` of all FALQON layers of the full model, extrapolated from the dry runs.

    Args:
        widths: for each dry run, the `in_features` of its FALQON layers, in order.
        counts: number of decoder layers of each dry run.
        layers: number of decoder layers of the full model.
    """
    if len(counts) == 1:
        return widths[0]
    added = widths[1][len(widths[0]) :]
    block = added[: len(added) // (counts[1] - counts[0])]
    return widths[0] + block * (layers - counts[0])


def _estimated(config: FinetuneConfig, model: nn.Module, shapes: Sequence[tuple[int, int]]) -> _Needs:
    """The same figures as `_measured`, estimated from shapes alone: without activations, and with None for the time."""
    linear = sum(out * into for out, into in shapes)
    others = sum(p.numel() for p in model.parameters()) - linear
    width = getattr(torch, config.dtype).itemsize
    adapter = _adapter(config, shapes)
    weights = others * width + int(linear * {"falqon": 1.0, "lora": width, "qlora": 0.53}[config.method])
    loaded = (others + linear) * width
    written = others * width + linear * (1 if config.method == "falqon" else width)
    checkpoint = 3 * 4 * adapter  # trained parameters and two moments, in fp32
    why = "this system does not support it" if config.device == "cpu" else "it needs the CPU and every package"
    note = f"memory and disk are estimated from shapes, without activations; no dry run was made: {why}"
    peak = max(loaded, weights + _FP32_STATES * 4 * adapter)
    return peak, written + config.keep_checkpoints * checkpoint, written, None, (note,), _NOT_PROBED


def _on_gpus(
    config: FinetuneConfig, settings: Any, shapes: Sequence[tuple[int, int]]
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Estimates of `pipeline.dry_run.costs` for a step on GPUs, by name, and notes that explain them.

    The estimates are empty, with a note on the reason, for models and settings that the cost model does not cover.
    """
    shape = Decoder.of_config(settings, sum(out * into for out, into in shapes))
    if shape is None:
        return {}, ("no GPU estimate: the layers are not those of a plain decoder (attention and one MLP, all alike)",)
    if config.dtype != "bfloat16" or (config.method == "falqon" and not config.rule.stacked):
        return {}, ("no GPU estimate: kernels were counted in bfloat16 only, and not for the update rule 'released'",)
    way, compiled = _ways(config)
    step = Step(
        config.batch_size, config.sequence_length, config.rank, config.gradient_checkpointing,
        config.gradient_accumulation,
    )  # fmt: skip
    devices, unknown = _devices(config.device)
    memory = estimate(shape, step, way, devices[0]).memory_bytes
    facts: dict[str, Any] = {"estimated_step_seconds": _step_seconds(shape, step, way, devices)}
    notes = [
        "estimated_step_seconds and estimated_memory_bytes (the GPU's peak) are computed from shapes, counted kernels "
        "and data sheets (docs/cost-model.md); no GPU has confirmed them",
        *unknown,
    ]
    if compiled is not None:
        facts["estimated_step_seconds_compiled"] = _step_seconds(shape, step, compiled, devices)
        notes.append("estimated_step_seconds_compiled: with decoder layers compiled, as finetune does where it can")
    if small := [device.name for device in devices if memory > device.memory_bytes]:
        notes.append(f"estimated_memory_bytes exceeds the memory of {', '.join(small)}")
    return facts | {"estimated_memory_bytes": memory}, tuple(notes)


def _ways(config: FinetuneConfig) -> tuple[Way, Way | None]:
    """The configured method in the cost model: without compilation, and compiled if it can be compiled."""
    if config.method != "falqon":
        return LORA if config.method == "lora" else QLORA, None
    return (LIVE, LIVE_COMPILED) if config.rule.live else (MERGED, MERGED_COMPILED)


def _devices(asked: str) -> tuple[Sequence[Device], tuple[str, ...]]:
    """The GPUs to estimate for, and notes on the choice.

    This is the GPU that the run would use, if its data sheet is known; otherwise all GPUs with known data sheets.
    """
    here = machine.gpus()[:1] if asked == "cuda" else []
    known = [device for gpu in here if (device := device_reported(gpu.name)) is not None]
    if here and not known:
        return DEVICES, (
            f"{here[0].name} is not in the table of data sheets; the estimates are for the GPUs of the table",
        )
    return known or DEVICES, ()


def _step_seconds(shape: Decoder, step: Step, way: Way, devices: Sequence[Device]) -> dict[str, float]:
    return {device.name: float(f"{estimate(shape, step, way, device).seconds:.3g}") for device in devices}


def _adapter(config: FinetuneConfig, shapes: Sequence[tuple[int, int]]) -> int:
    """The number of trained parameters, from the shapes (out, in) of the linear layers."""
    return sum(out if config.method == "falqon" else out + into for out, into in shapes) * config.rank


def _stored_dtype(base: Path) -> torch.dtype:
    """The dtype of the checkpoint's first matrix, assumed to be that of all; bf16 if that is quantized or fp64."""
    entries = header_entries(weight_files(base)[0]).values()
    first = next((entry.dtype for entry in entries if len(entry.shape) == 2), "BF16")
    return DTYPES[first] if first in PLAIN_FLOATS - {"F64"} else torch.bfloat16
