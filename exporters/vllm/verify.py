"""Checks for trained language models and their exports to vLLM.

An export is verified by planning it again with its own files as the source. The linter's rules then apply to the files
as written, and config.json and the manifest can be compared with what the plan would write.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from exporters.verify.common import (
    compare_details,
    compare_files,
    compare_gates,
    compare_json,
    compare_layers,
    failed_gates,
    lint_findings,
)
from exporters.vllm.export import details_of, plan_export
from exporters.vllm.inputs import input_findings, inputs_gate, with_inputs
from exporters.vllm.kv_cache import is_kv_scale, scales_gate
from exporters.vllm.lint import lint
from exporters.vllm.nvfp4 import stored_layout, with_global_scales
from exporters.vllm.options import VllmExportOptions
from exporters.vllm.plan import ExportPlan, build_plan
from exporters.vllm.reopen import reopen
from exporters.vllm.reopen_files import quant_file_differences
from exporters.vllm.source import HUGGING_FACE, Source
from exporters.vllm.target import VllmDetails
from exporters.vllm.writer import CONFIG_NAME, export_config
from fp8pipe.artifact import MANIFEST_NAME, Artifact
from fp8pipe.artifact.finding import Check, Finding
from fp8pipe.artifact.kinds import FALQON_KIND
from fp8pipe.models.checkpoint.packed import join_packed
from fp8pipe.models.checkpoint.sidecars import SERVED_FILES, sidecar_files
from fp8pipe.models.checkpoint.stacks import split_stacks
from fp8pipe.models.checkpoint.tensors import TensorEntry, weight_entries
from fp8pipe.models.language.ending import EOS, GENERATION_FILE, stop_tokens
from fp8pipe.models.language.structure import ModelStructure, read_structure


def plan_itself(artifact: Artifact) -> ExportPlan:
    """Plan an export to vLLM again, with its own files as the source; raises the same errors as `plan_export`."""
    options = VllmExportOptions.model_validate(artifact.manifest.config)
    config = json.loads((artifact.root / CONFIG_NAME).read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    details = artifact.manifest.details_of(VllmDetails)
    added = _added(artifact)
    tensors = join_packed({n: e for n, e in weight_entries(artifact.root).items() if n not in added})
    source = Source(
        root=artifact.root,
        kind=FALQON_KIND if options.format.quantized else HUGGING_FACE,
        config=config,
        tensors=split_stacks(config.get("model_type"), tensors),
        transposed=frozenset(name.removesuffix(".weight") for name in details.transposed),
        layers={layer.name: layer for layer in artifact.manifest.layers},
        adapter="flushed",
        parent=artifact.as_parent(),
    )
    plan = build_plan(source, read_structure(artifact.root), options)
    return with_known_inputs(replace(plan, kv_cache=details.kv_cache or {}), details)


def with_known_inputs(plan: ExportPlan, details: VllmDetails) -> ExportPlan:
    """The plan with the scales of inputs that follow from the magnitudes in an export's manifest, if it has any."""
    return plan if details.inputs is None else with_inputs(plan, details.inputs, details.calibration)


def check_vllm(artifact: Artifact, parent: Path | None, notes: list[str]) -> Iterator[Finding]:
    """Check an export to vLLM for consistency and, if `parent` is given, against that artifact or model.

    Args:
        artifact: the export.
        parent: the artifact or model from which it was made; None if it is not available.
        notes: not used here; the checks of all targets take it.
    """
    plan = plan_itself(artifact)
    tensors = plan.source.tensors
    yield from lint_findings(lint(plan))
    yield from unexpected_tensors(tensors, plan.structure)
    yield from stray_weights(artifact.root, tensors)
    for unit in plan.dropped:
        yield Finding(Check.LINT, unit.entry.name, "a second copy of a tied tensor, which no export stores")
    yield from _added_scales(artifact, plan)
    yield from _statements(artifact, plan)
    if parent is not None:
        yield from _against(artifact, plan, parent)


def _added_scales(artifact: Artifact, plan: ExportPlan) -> Iterator[Finding]:
    """Check the scales of the key/value cache and of inputs in the files, and compare them with the manifest's."""
    written = _added(artifact)
    for name in sorted(written.keys() - plan.kv_tensors.keys() - set(plan.input_names)):
        what = "the key/value cache" if is_kv_scale(name) else "inputs"
        yield Finding(Check.REOPEN, name, f"a scale of {what} that the manifest does not name")
    yield from lint_findings(input_findings(plan, written))
    gates = [scales_gate(plan.kv_tensors, written, plan.layout.shape)]
    gates += [inputs_gate(plan, written)] if plan.input_names else []
    for gate in gates:
        if not gate.passed:
            yield Finding(Check.REOPEN, gate.name, gate.detail)


def _added(artifact: Artifact) -> dict[str, TensorEntry]:
    """The tensors in the files that have no source: scales of the key/value cache and of inputs."""
    inputs = stored_layout(artifact).inputs
    entries = weight_entries(artifact.root)
    return {name: entry for name, entry in entries.items() if is_kv_scale(name) or name.endswith(inputs)}


def _statements(artifact: Artifact, plan: ExportPlan) -> Iterator[Finding]:
    """Compare the manifest and the quantization block of config.json with the weight files."""
    written = json.loads((artifact.root / CONFIG_NAME).read_text(encoding="utf-8"))
    block, expected = written.get("quantization_config"), export_config(plan).get("quantization_config")
    for found in compare_json(block, expected, CONFIG_NAME):
        yield Finding(Check.REOPEN, found.where, f"quantization_config: {found.why}")
    if plan.options.layout == "modelopt":
        for where in quant_file_differences(plan, artifact.root):
            yield Finding(Check.REOPEN, where, "it does not follow from the weight files")
    manifest = artifact.manifest
    yield from compare_layers(manifest, plan.layers)
    stored = manifest.number_format
    stated = None if stored is None else (stored.name, stored.granularity)
    form = plan.options.format
    if stated != ((form.codes, form.weight_granularity) if form.quantized else None):
        yield Finding(Check.MANIFEST, "number_format", f"{stated}; the files hold {form}")
    added = manifest.details_of(VllmDetails).stop_token_added
    if added is not None and added not in stop_tokens(artifact.root):
        yield Finding(
            Check.MANIFEST, GENERATION_FILE, f"the manifest says that {EOS} contains {added}, but it does not"
        )
    # These depend on the source of the export, so they are compared only if the parent is available.
    unknown = frozenset({"quantized_here", "trained_activations", "stop_token_added"})
    yield from compare_details(artifact, details_of(plan), unknown)


def _against(artifact: Artifact, own: ExportPlan, parent: Path) -> Iterator[Finding]:
    """Compare every number and file with the parent's; `own` is the plan of the export from its own files."""
    added = artifact.manifest.details_of(VllmDetails).stop_token_added
    # A plain model was already hashed when it was identified as the parent; an artifact was not.
    plan = plan_export(parent, own.options, verify=(parent / MANIFEST_NAME).is_file()).stopping_as(added)
    plan = with_known_inputs(with_global_scales(plan), artifact.manifest.details_of(VllmDetails))
    yield from compare_layers(artifact.manifest, plan.layers)
    yield from compare_details(artifact, details_of(plan))
    gates = reopen(plan, artifact.root)
    yield from failed_gates(gates)
    yield from compare_gates(artifact, [gate for gate in gates if gate.passed])
    judged = {Path(GENERATION_FILE)} if plan.ending.settings is not None else set()  # compared key by key by a gate
    files = [set(sidecar_files(root, SERVED_FILES)) - judged for root in (artifact.root, parent)]
    yield from compare_files(artifact.root, parent, *files)


def stray_weights(root: Path, tensors: dict[str, TensorEntry], allowed: tuple[str, ...] = ()) -> Iterator[Finding]:
    """Findings on weight files that the index does not name, which some loaders would read as well.

    `allowed` are names of files that may be there.
    """
    used = {entry.file for entry in tensors.values()}
    for path in sorted(root.glob("*.safetensors")):
        if path not in used and path.name not in allowed:
            yield Finding(Check.REOPEN, path.name, "the index does not name this file")


def unexpected_tensors(tensors: dict[str, TensorEntry], structure: ModelStructure) -> Iterator[Finding]:
    """Findings on adapter tensors in the weights, and on tensors that the files lack or hold in another shape.

    Shapes are compared with the architecture's for vectors and scalars only.

    Experts that transformers holds as one stacked tensor are skipped, since checkpoints store them under other names.
    """
    for name in sorted(tensors):
        if "lora_" in name or ".base_layer." in name:
            yield Finding(Check.LINT, name, "a tensor of an adapter, which no engine loads from an export")
    tensors = split_stacks(structure.model_type, tensors)
    table = structure.naming.table(tensors)
    stored = {known.name: tensors[name] for name, known in table.items() if known.whole}
    joined = {known.name for known in table.values() if not known.whole}
    for name, shape in structure.tensors.items():
        if (
            name in joined
            or ("expert" in name and len(shape) > 2)
            or name in structure.tied
            or name in structure.tied.values()
        ):
            continue
        found = stored.get(name)
        if found is None:
            yield Finding(Check.LINT, name, "the architecture in config.json has this tensor, the files lack it")
        elif len(found.shape) < 2 and found.shape != shape:
            why = f"shape {found.shape}; config.json declares {shape}"
            yield Finding(Check.LINT, name, why)
