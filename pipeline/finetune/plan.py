"""Plan a fine-tuning run (`--dry-run`) from file headers, shapes and the text, without reading or running the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from fp8pipe.core import machine
from fp8pipe.core.devices import resolve_device
from fp8pipe.core.machine import format_bytes
from fp8pipe.core.plan import Missing, Plan, missing_disk, missing_memory, missing_packages
from fp8pipe.models.checkpoint.names import checkpoint_names
from fp8pipe.models.language.base import check_base, unknown_tensors
from fp8pipe.models.language.ending import read_ending
from fp8pipe.models.language.sources import resolve_model
from fp8pipe.models.language.structure import ModelStructure, load_config, model_class
from fp8pipe.models.language.unstacking import unstack_experts
from pipeline.dry_run.costs import (
    BOTH,
    BOTH_COMPILED,
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
from pipeline.falqon.convert import base_bytes, groups_of, read_convertible
from pipeline.falqon.forms import form_of
from pipeline.finetune.config import FinetuneConfig, check_processes
from pipeline.finetune.method import export_warnings
from pipeline.finetune.needs import estimate_needs, required_packages
from pipeline.tracking.config import missing_trackers

_ONE_GPU: Final = ("no GPU estimate of step time: the cost model is that of one GPU (docs/cost-model.md)",)
_SMALLER: Final = "a smaller --batch-size or --sequence-length, --gradient-checkpointing, or a smaller model"


def plan_finetune(config: FinetuneConfig, output: Path | None = None) -> Plan:
    """Plan a run from the model's headers and the text; memory, disk space and time are estimated.

    Args:
        config: the resolved configuration.
        output: directory of the artifact; None if the user has not named one.

    Raises:
        ConfigurationError: the run itself would reject the model, the text or the rank.
        MissingCapabilityError: a GPU was requested, but none is available that supports the method.
    """
    processes, here = _processes(config)
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
    form = form_of(config.precision, config.rule)
    form.check(structure)
    names = checkpoint_names(source.path, structure.naming, structure.trainable)
    warnings = [
        *unknown_tensors(source.path, structure),
        *export_warnings(source.path, config.method, config.precision, names.values()),
    ]
    shapes = [structure.shape(name) for name in structure.trainable]
    missing = (*missing_packages(required_packages(config)), *missing_trackers(config.report_to))
    base = 0 if config.method != "falqon" else base_bytes(
        form, structure, config.rule, config.rank, config.initialisation or config.rule.initialisation
    )  # fmt: skip
    needs = estimate_needs(config, source, settings, structure, names, processes)
    on_gpus, told = _on_gpus(config, settings, shapes) if processes == 1 else ({}, _ONE_GPU)
    where = output or Path(config.model).name
    return Plan(
        reads=(f"{config.model} ({source.path})", config.data),
        writes=(f"{where}", f"{where}.partial while it runs"),
        peak_memory_bytes=needs.peak,
        disk_bytes=needs.disk.most,
        output_bytes=needs.disk.output,
        seconds=needs.seconds,
        hardware="a CPU" if config.device == "cpu" else str(config.gpu_need),
        packages=required_packages(config),
        missing=(
            *missing,
            *_missing_memory(config, needs.peak, here),
            *missing_disk(output or Path(), needs.disk.most),
        ),
        notes=(*warnings, *read_ending(source.path, tuned=True).warnings(), *needs.notes, *told),
        facts={
            "device": str(device),
            "layers": len(shapes),
            "left_out": structure.left_out,
            "trainable": _adapter(config, structure),
            **({"converted_base_bytes": base} if base else {}),
            "packing": needs.packing,
            "steps": config.steps,
            "tokens": config.steps * config.gradient_accumulation * config.batch_size * config.sequence_length,
            "mapped_bytes": needs.mapped,
            "temporary_bytes": needs.temporary,
            **({"processes": processes, **needs.shares} if processes > 1 else {}),
            **on_gpus,
        },
    )


def _processes(config: FinetuneConfig) -> tuple[int, int]:
    """The number of processes that a launcher started for this plan, as it would for the run: in all, and here.

    Raises:
        ConfigurationError: so many cannot share the run.
    """
    from fp8pipe.core.launch import launched

    place = launched()
    if place is None:
        return 1, 1
    from pipeline.finetune.distributed.machines import local_size

    check_processes(config, place.size)
    return place.size, local_size(place.size)


def _missing_memory(config: FinetuneConfig, peak: int, here: int) -> tuple[Missing, ...]:
    """An entry if the device has less memory than a process needs; on a CPU, than all that are `here` need."""
    if config.device == "cpu":
        return missing_memory(peak * here, _SMALLER)
    found = next(iter(machine.gpus()), None)
    if found is None or peak <= found.memory_bytes:
        return ()
    return (
        Missing(f"GPU memory: {format_bytes(peak)} at the peak, {found.name} has {format_bytes(found.memory_bytes)}",
                _SMALLER),
    )  # fmt: skip


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
    if config.precision == "nvfp4":
        return {}, ("no GPU estimate: the cost model does not know weights in NVFP4",)
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
    if config.rule.trains_a:
        return BOTH, BOTH_COMPILED
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


def _adapter(config: FinetuneConfig, structure: ModelStructure) -> int:
    """The number of trained parameters; stacked layers share their A."""
    inputs = structure.trainable
    if config.method == "falqon":
        inputs = tuple(members[0] for members in groups_of(structure, config.rule)) if config.rule.trains_a else ()
    rows = sum(structure.shape(name)[0] for name in structure.trainable)
    return config.rank * (rows + sum(structure.shape(name)[1] for name in inputs))
