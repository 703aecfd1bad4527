"""Checks on trained language models and on their exports to vLLM.

An export is planned again with itself as the source. Then every rule of the linter applies to what it holds, and what
the plan says must be in config.json and in the manifest can be compared with what is there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from exporters.verify.common import (
    compare_files,
    compare_gates,
    compare_json,
    compare_layers,
    failed_gates,
    lint_discrepancies,
)
from exporters.vllm.auxiliary import CONFIG_NAME, auxiliary_files, export_config
from exporters.vllm.export import plan_export
from exporters.vllm.lint import lint
from exporters.vllm.options import ExportFormat, VllmExportOptions
from exporters.vllm.plan import ExportPlan, build_plan
from exporters.vllm.reopen import reopen
from exporters.vllm.source import Source, SourceKind
from fp8pipe.artifact import Artifact
from fp8pipe.artifact.discrepancy import Catcher, Discrepancy
from fp8pipe.models.checkpoint.tensors import TensorEntry, weight_entries
from fp8pipe.models.language.structure import ModelStructure, build_on_meta, load_config, read_structure

__all__ = ["check_trained", "check_vllm", "plan_itself", "stray_weights", "unexpected_tensors"]

_TWO_AXES = 2


def check_trained(artifact: Artifact, parent: Path | None, notes: list[str]) -> Iterator[Discrepancy]:
    """An artifact of `finetune`: values, shapes, adapter, and what the manifest says of its layers."""
    plan = plan_export(artifact.root, VllmExportOptions(format=ExportFormat.BF16))  # the rules of any format
    yield from lint_discrepancies(lint(plan))
    yield from unexpected_tensors(artifact.root, plan.source.tensors, plan.structure)
    yield from stray_weights(artifact.root, plan.source.tensors, ("adapter.safetensors",))
    yield from _stated_layers(artifact, plan)


def _stated_layers(artifact: Artifact, plan: ExportPlan) -> Iterator[Discrepancy]:
    """Layers, granularity and orientation of a trained artifact."""
    manifest, tensors = artifact.manifest, plan.source.tensors
    coded = {name.removesuffix(".weight") for name, entry in tensors.items() if entry.dtype == "F8_E4M3"}
    stated = {layer.name for layer in manifest.layers if layer.converted}
    for name in sorted(coded ^ stated):
        why = "holds FP8 codes, and the manifest does not say so" if name in coded else "holds no FP8 codes"
        yield Discrepancy(Catcher.MANIFEST, name, why)
    transposed = {str(name).removesuffix(".weight") for name in manifest.extra.get("transposed") or []}
    for unit in plan.units:
        stem = unit.entry.name.removesuffix(".weight")
        if stem in coded and unit.transposed != (stem in transposed):
            why = f"the manifest says transposed={stem in transposed}, the model says {unit.transposed}"
            yield Discrepancy(Catcher.MANIFEST, unit.entry.name, why)
    shapes = {layer.name: layer.shape for layer in manifest.layers if layer.shape is not None}
    for name in sorted(coded & shapes.keys()):
        shape = tensors[f"{name}.weight"].shape
        if shapes[name] not in (shape, shape[::-1]):
            yield Discrepancy(Catcher.MANIFEST, name, f"the manifest says shape {shapes[name]}, it is {shape}")
    if (manifest.number_format is None) != (not coded):
        stated_format = manifest.number_format.name if manifest.number_format else "no number format"
        yield Discrepancy(Catcher.MANIFEST, "number_format", f"the manifest says {stated_format}; {len(coded)} layers "
                          "hold FP8 codes")  # fmt: skip
    elif manifest.number_format is not None and manifest.number_format.name != "e4m3":
        yield Discrepancy(Catcher.MANIFEST, "number_format", f"{manifest.number_format.name}; the files hold e4m3")


def plan_itself(artifact: Artifact) -> ExportPlan:
    """What an export to vLLM would be if its own files were the source.

    Raises:
        BadArtifactError: its weights cannot be read.
        ConfigurationError: an architecture that is not known here, or options that do not fit.
    """
    options = VllmExportOptions.model_validate(artifact.manifest.config)
    config = json.loads((artifact.root / CONFIG_NAME).read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    names = artifact.manifest.extra.get("transposed") or []
    source = Source(
        root=artifact.root,
        kind=SourceKind.FALQON if options.format.quantized else SourceKind.HUGGING_FACE,
        config=config,
        tensors=weight_entries(artifact.root),
        transposed=frozenset(str(name).removesuffix(".weight") for name in names),
        extra={"adapter": "flushed"},
        parent=artifact.as_parent(),
    )
    return build_plan(source, read_structure(artifact.root), options)


def check_vllm(artifact: Artifact, parent: Path | None, notes: list[str]) -> Iterator[Discrepancy]:
    """An export to vLLM."""
    plan = plan_itself(artifact)
    tensors = plan.source.tensors
    yield from lint_discrepancies(lint(plan))
    yield from unexpected_tensors(artifact.root, tensors, plan.structure)
    yield from stray_weights(artifact.root, tensors)
    for unit in plan.dropped:
        yield Discrepancy(Catcher.LINT, unit.entry.name, "a second copy of a tied tensor, which no export holds")
    yield from _statements(artifact, plan)
    if parent is not None:
        yield from _against(artifact, plan, parent)


def _statements(artifact: Artifact, plan: ExportPlan) -> Iterator[Discrepancy]:
    """config.json's quantization block and the manifest, against the files."""
    written = json.loads((artifact.root / CONFIG_NAME).read_text(encoding="utf-8"))
    block, expected = written.get("quantization_config"), export_config(plan).get("quantization_config")
    for found in compare_json(block, expected, CONFIG_NAME):
        yield Discrepancy(Catcher.REOPEN, found.where, f"quantization_config: {found.why}")
    manifest, quantized = artifact.manifest, plan.options.format.quantized
    yield from compare_layers(manifest.layers, plan.layers)
    said = manifest.number_format
    stated = None if said is None else (said.name, said.granularity)
    if stated != (("e4m3", "per-channel") if quantized else None):
        yield Discrepancy(Catcher.MANIFEST, "number_format", f"{stated}; the files hold {plan.options.format}")
    facts = {
        "format": plan.options.format.value,
        "transposed": [u.entry.name for u in plan.units if u.quantized and u.transposed],
        "ignore": list(plan.ignore),
        "payload_bytes": plan.payload_bytes,
    }
    yield from compare_json({key: manifest.extra.get(key) for key in facts}, facts, "manifest.json", "extra")


def _against(artifact: Artifact, own: ExportPlan, parent: Path) -> Iterator[Discrepancy]:
    """Every number and file, against those of the source."""
    plan = plan_export(parent, own.options)
    gates = reopen(plan, artifact.root)
    yield from failed_gates(gates)
    yield from compare_gates(artifact, [gate for gate in gates if gate.passed])
    yield from compare_files(artifact.root, parent, auxiliary_files(artifact.root), auxiliary_files(parent))


def stray_weights(root: Path, tensors: dict[str, TensorEntry], allowed: tuple[str, ...] = ()) -> Iterator[Discrepancy]:
    """Weight files that no index names: a loader that takes all of them loads another model."""
    used = {entry.file for entry in tensors.values()}
    for path in sorted(root.glob("*.safetensors")):
        if path not in used and path.name not in allowed:
            yield Discrepancy(Catcher.REOPEN, path.name, "the index does not name this file")


def unexpected_tensors(root: Path, tensors: dict[str, TensorEntry], structure: ModelStructure) -> Iterator[Discrepancy]:
    """Adapters left in the weights, and tensors that the architecture has and the files lack.

    Expert weights are left out: transformers holds them stacked, under names that no checkpoint has.
    """
    state = build_on_meta(load_config(root)).state_dict()
    prefix = f"{structure.base_prefix}."
    for name in sorted(tensors):
        if "lora_" in name or ".base_layer." in name:
            yield Discrepancy(Catcher.LINT, name, "an adapter's tensor, which no engine loads from here")
    for name, parameter in state.items():
        places = {name, name.removeprefix(prefix), prefix + name}
        if "expert" in name or name in structure.tied or name in structure.tied.values():
            continue
        found = next((tensors[place] for place in places if place in tensors), None)
        if found is None:
            yield Discrepancy(Catcher.LINT, name, "the architecture of config.json has it, the files do not")
        elif len(found.shape) < _TWO_AXES and found.shape != tuple(parameter.shape):
            why = f"shape {found.shape}; config.json declares {tuple(parameter.shape)}"
            yield Discrepancy(Catcher.LINT, name, why)
