"""Estimates what a fine-tuning run needs on this machine: memory, disk space and time, without running any of it."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any, Final

import torch

from fp8pipe.core import machine
from fp8pipe.core.machine import current_bytes, format_bytes, resident_bytes, return_freed_memory
from fp8pipe.models.checkpoint.quantized.base import read_base
from fp8pipe.models.checkpoint.sidecars import BASE_MODEL_FILES, sidecar_bytes
from fp8pipe.models.checkpoint.tensors import DTYPES
from fp8pipe.models.language.sources import ModelSource
from fp8pipe.models.language.structure import ModelStructure
from fp8pipe.numerics.bf16 import widen_bf16_products
from pipeline.dry_run.activations import layer_count, saved_bytes
from pipeline.dry_run.batches import BatchSizes, batch_sizes, largest_with_images, probe_packing
from pipeline.dry_run.costs import CONTEXT_BYTES
from pipeline.dry_run.disk import DiskNeed, disk_need
from pipeline.dry_run.memory import mapped_bytes, phase_bytes, shares, static_bytes, sums_bytes
from pipeline.dry_run.rates import measure_rates
from pipeline.dry_run.times import Schedule, phase_seconds
from pipeline.dry_run.towers import tower_bytes
from pipeline.dry_run.workload import Group, Workload
from pipeline.falqon.grouped import fits, has_kernel
from pipeline.falqon.rules import FinalMerge, Initialisation
from pipeline.finetune.batches import Batch
from pipeline.finetune.config import FinetuneConfig
from pipeline.finetune.kv_cache import CALIBRATION_RECORDS, HELDOUT_RECORDS
from pipeline.finetune.loading import waits_on_host
from pipeline.finetune.packing import packing_warning
from pipeline.finetune.room import moment_bytes, output_sizes
from pipeline.finetune.text import TrainingText, load_text

# Allocated memory that the allocator holds beyond what is in use: 20 % in the runs that docs/planning.md compares.
_ALLOCATOR: Final = 1.2
_PACKAGES: Final = {"falqon": (), "lora": ("peft",), "qlora": ("peft", "bitsandbytes")}
_PACKING: Final = {
    "positions": "several examples a row, kept apart by restarting positions",
    "mask": "several examples a row, kept apart by a mask per example",
    "off": "off: this model does not keep the examples of a row apart",
}
_MAPPED: Final = "mapped: weights in memory that the system drops and reads again from their files when it is short"
_TOWER: Final = (
    "the tokens of images and the memory of the vision tower are counted; not counted are its time and the reading of "
    "image files"
)
_UNKNOWN_TOWER: Final = (
    "the tokens of images are counted; the memory of this model's vision tower could not be, since its code depends on "
    "values; nor are its time and the reading of image files"
)
_EACH: Final = (
    "memory is that of each process, the most of any; time is not estimated, as it depends on the links between them"
)
_NOT_PROBED: Final = "only if the model keeps the examples of a row apart, which is tested once it is loaded"


@dataclass(frozen=True, slots=True)
class Needs:
    """What a run needs.

    Attributes:
        peak: bytes of memory that it holds at most: of this machine, or of the GPU.
        mapped: bytes of weights that are also in memory, mapped from files, as long as nothing else needs it.
        disk: the most disk space, and that of the output.
        temporary: bytes of temporary files.
        seconds: wall time; None on a GPU.
        packing: what becomes of packing, in words.
        shares: what each of several processes holds; see `pipeline.dry_run.memory.shares`.
        notes: how the figures were obtained.
    """

    peak: int
    mapped: int
    disk: DiskNeed
    temporary: int
    seconds: float | None
    packing: str
    shares: Mapping[str, int]
    notes: tuple[str, ...]


def estimate_needs(
    config: FinetuneConfig, source: ModelSource, settings: Any, structure: ModelStructure, names: dict[str, str],
    processes: int = 1,
) -> Needs:  # fmt: skip
    """Estimate a run from the model's shapes, file headers and the training text.

    Args:
        config: with its device resolved.
        source: the base model.
        settings: its transformers configuration.
        structure: of the model, after a probe pass.
        names: the trained layers' names in the checkpoint, by module path.
        processes: number of processes that share the run; memory is then that of each.

    Raises:
        ConfigurationError: the run itself would reject the text.
    """
    text = load_text(config, source)
    resident = _resident(config)  # before anything is loaded that only a plan needs
    dtype, on_cpu = getattr(torch, config.dtype), config.device == "cpu"
    text, packing, warning = _packed(config, settings, structure, text)
    return_freed_memory()
    resident = max(resident, current_bytes())  # with what torch compiles for products: about 1 MB for each shape
    train = batch_sizes(text.train, config.steps * config.gradient_accumulation)
    tower = _tower(settings, dtype, largest_with_images(text.train, config.steps * config.gradient_accumulation))
    base = read_base(source.path)
    trained = {f"{name}.weight" for name in names.values()}
    shards = output_sizes(config, base.entries, trained)
    saved = saved_bytes(settings, dtype, train.rows, train.length)
    plain = base.stored is None and not structure.naming.experts
    work = _workload(config, settings, structure, train, saved, shards)
    others = sum(entry.size_bytes for name, entry in base.entries.items() if name not in trained)
    mapped = plain and on_cpu and all(DTYPES[entry.dtype] == dtype for entry in base.entries.values())
    work = replace(work, stored=(work.weights * dtype.itemsize, others), mapped=mapped, tower=tower or 0)
    work = work if processes == 1 else _shared(work, processes, config)
    disk = disk_need(
        work, shards=shards, tensors=len(base.entries), sidecars=sidecar_bytes(source.path, BASE_MODEL_FILES),
        saves=config.saves, kept=config.keep_checkpoints, moments=moment_bytes(config),
    )  # fmt: skip
    phases = phase_bytes(work)
    peak = (resident if on_cpu else CONTEXT_BYTES) + int(_ALLOCATOR * max(phases.values()))
    timed = on_cpu and processes == 1
    seconds, rates = _seconds(config, work, text, train, config.saves, dtype) if timed else (None, "")
    largest = max(phases, key=lambda phase: phases[phase])
    uncounted = "" if saved is not None else "; the activations of this architecture could not be counted"
    notes = (
        *((warning,) if warning else ()),
        *((_UNKNOWN_TOWER if tower is None else _TOWER,) if text.train.has_images else ()),
        f"memory{'' if on_cpu else ' (of the GPU)'} and disk are estimated from shapes, within about 20 %; memory is "
        f"largest in the phase {largest!r}{uncounted}",
        *((_MAPPED,) if work.mapped else ()),
        *((_EACH,) if processes > 1 else ()),
        *((rates,) if rates else ()),
    )
    return Needs(
        peak, mapped_bytes(work), disk, sums_bytes(work), seconds, packing, shares(work) if processes > 1 else {}, notes
    )


def _tower(settings: Any, dtype: torch.dtype, batch: Batch | None) -> int | None:
    """Bytes that the vision tower takes for a batch; None if they cannot be counted."""
    read = None if batch is None else batch.image_inputs
    return 0 if read is None else tower_bytes(settings, dtype, read())


def required_packages(config: FinetuneConfig) -> tuple[str, ...]:
    """The distributions beyond fp8pipe's own that a run imports, each a module of that name."""
    eight_bits = ("bitsandbytes",) if config.optimizer == "adamw-8bit" else ()
    return tuple(dict.fromkeys((*_PACKAGES[config.method], *eight_bits)))


def _resident(config: FinetuneConfig) -> int:
    """Peak memory of this process, which then has imported what the run on a CPU imports."""
    for name in required_packages(config) if config.device == "cpu" else ():
        with contextlib.suppress(ImportError):  # of a package that is missing, the plan tells elsewhere
            import_module(name)
    return resident_bytes()


def _shared(work: Workload, processes: int, config: FinetuneConfig) -> Workload:
    """The same run in several processes."""
    from pipeline.finetune.distributed.machines import count_replicas

    shared = replace(
        work, processes=processes, shards=processes, moments=moment_bytes(config), packed_on_host=config.device != "cpu"
    )
    gathered = shares(shared)["gathered_bytes"]
    return replace(shared, shards=processes // count_replicas(static_bytes(shared), gathered, processes, config.device))


def _packed(
    config: FinetuneConfig, settings: Any, structure: ModelStructure, text: TrainingText
) -> tuple[TrainingText, str, str]:
    """The text as the run will batch it, what becomes of packing, and a warning or an empty string."""
    if not config.packing:
        return text, "off, as asked", ""
    if text.packing is not None:
        return text, f"off: {text.packing.reason}", packing_warning(text.packing)
    found = probe_packing(settings, getattr(torch, config.dtype), _weights(structure), text.train)
    if found is None:
        return text, _NOT_PROBED, ""
    if found.how == "off":
        text = replace(text, train=text.train.unpacked(), heldout=text.heldout.unpacked())
    return text, _PACKING[found.how], packing_warning(found)


def _weights(structure: ModelStructure) -> int:
    return sum(math.prod(shape) for shape in structure.tensors.values())


def _workload(
    config: FinetuneConfig, settings: Any, structure: ModelStructure, train: BatchSizes, saved: int | None,
    shards: Mapping[str, int],
) -> Workload:  # fmt: skip
    """The run's shapes; `stored` and `mapped` are still to be filled in."""
    falqon, text = config.method == "falqon", settings.get_text_config(decoder=True)
    stacked = not falqon or config.rule.stacked
    members = structure.input_groups if stacked else tuple((name,) for name in structure.trainable)
    grouped = config.precision == "fp8" and config.device != "cpu"
    together = _together(config, structure, members) if grouped else {}
    groups = tuple(
        Group(
            tuple(structure.shape(name)[0] for name in each), structure.shape(each[0])[1],
            _expert_share(text) if structure.is_expert(each[0]) else 1.0, together.get(each[0], 1),
        )
        for each in members
    )  # fmt: skip
    layers, tokens = layer_count(settings), train.rows * train.length
    itemsize, hidden = getattr(torch, config.dtype).itemsize, int(text.hidden_size)
    if saved is None:  # about what a layer of Llama saves
        saved = int(itemsize * tokens * sum(g.share * (g.rows + g.width) for g in groups) / layers)
    heads = int(getattr(text, "num_attention_heads", 1))
    return Workload(
        method=config.method, groups=groups, rank=config.rank,
        gradients=falqon and config.initialisation is Initialisation.GRADIENT,
        compensated=config.precision is not None and config.rule.final is FinalMerge.COMPENSATED,
        flushes=falqon and config.rule.flush_every_step,
        layers=layers, hidden=hidden, query=heads * int(getattr(text, "head_dim", None) or hidden // heads),
        vocabulary=int(text.vocab_size), itemsize=itemsize, stored=(0, 0), mapped=False,
        streamed=waits_on_host(config, itemsize * _weights(structure)), filed=falqon and config.device == "cpu",
        shard=max(shards.values()),
        tokens=tokens, length=train.length, answers=train.answers, saved=saved,
        checkpointing=config.gradient_checkpointing, packed=config.precision == "nvfp4",
        trains_a=falqon and config.rule.trains_a,
    )  # fmt: skip


def _expert_share(text: Any) -> float:
    """The fraction of tokens that an expert receives on average; the most of any layer."""
    count = _number(text, "num_local_experts", "num_experts", "n_routed_experts") or 1
    return min(1.0, (_number(text, "num_experts_per_tok", "top_k_experts") or count) / count)


def _number(text: Any, *names: str) -> int:
    """The first of these settings that is given, or its largest value if layers have their own (Hunyuan); else 0."""
    given = next((value for name in names if (value := getattr(text, name, None))), 0)
    return max(given) if isinstance(given, list | tuple) else int(given)


def _together(
    config: FinetuneConfig, structure: ModelStructure, members: Sequence[tuple[str, ...]]
) -> Mapping[str, int]:
    """How many experts this machine's GPU multiplies at once, by the first linear of each group of such experts."""
    gpu = next(iter(machine.gpus()), None)
    if gpu is None or not has_kernel(getattr(torch, config.dtype), gpu.capability):
        return {}
    found: dict[str, int] = {}
    for layer in structure.naming.experts:
        experts = [each for each in members if each[0].startswith(f"{layer}.")]
        shapes = [(sum(structure.shape(name)[0] for name in each), structure.shape(each[0])[1]) for each in experts]
        if fits(config.rule.scale, (config.rank, *(side for shape in shapes for side in shape))):
            leaves = [each[0].removeprefix(f"{layer}.").partition(".")[2] for each in experts]
            counts = Counter(leaves)
            found |= {each[0]: counts[leaf] for each, leaf in zip(experts, leaves, strict=True)}
    return found


def _seconds(
    config: FinetuneConfig, work: Workload, text: TrainingText, train: BatchSizes, saves: int, dtype: torch.dtype
) -> tuple[float, str]:
    """Wall time on this machine, and the note that says how it was estimated."""
    widen_bf16_products()
    largest = max(work.groups, key=lambda group: group.weights)
    rates = measure_rates(work.tokens, largest.width, largest.rows, dtype)
    heldout = batch_sizes(text.heldout, len(text.heldout))
    often = Schedule(
        steps=config.steps, accumulation=config.gradient_accumulation,
        evaluations=2 + (math.ceil(config.steps / config.evaluate_every) if config.evaluate_every else 1),
        heldout_batches=heldout.count,
        calibration_batches=min(train.count, math.ceil(CALIBRATION_RECORDS / train.rows)),
        cache_batches=min(heldout.count, math.ceil(HELDOUT_RECORDS / heldout.rows)),
        saves=saves, gradient_batches=config.gradient_batches,
        merge_batches=config.merge_batches, train_share=train.share,
        heldout_share=heldout.share * heldout.rows * heldout.length / work.tokens,
    )  # fmt: skip
    told = (
        f"time is estimated from {rates.products / 1e9:.3g} GFLOP/s and {format_bytes(int(rates.memory))}/s, measured "
        "now on this machine; a run takes between half and twice as long"
    )
    return sum(phase_seconds(work, often, rates).values()), told
