"""Checks on fine-tuned language models: values, shapes, adapter, and what the manifest says of its layers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from exporters.verify.common import lint_findings
from exporters.vllm.export import plan_export
from exporters.vllm.lint import lint
from exporters.vllm.options import ExportFormat, VllmExportOptions
from exporters.vllm.plan import ExportPlan
from exporters.vllm.verify import stray_weights, unexpected_tensors
from fp8pipe.artifact import Artifact
from fp8pipe.artifact.finding import Check, Finding
from fp8pipe.artifact.kinds import TunedDetails

__all__ = ["check_tuned"]


def check_tuned(artifact: Artifact, parent: Path | None, notes: list[str]) -> Iterator[Finding]:
    """An artifact of `finetune`: values, shapes, adapter, and what the manifest says of its layers."""
    plan = plan_export(artifact.root, VllmExportOptions(format=ExportFormat.BF16))  # the rules of any format
    yield from lint_findings(lint(plan))
    yield from unexpected_tensors(plan.source.tensors, plan.structure)
    yield from stray_weights(artifact.root, plan.source.tensors, ("adapter.safetensors",))
    yield from _stated_layers(artifact, plan)


def _stated_layers(artifact: Artifact, plan: ExportPlan) -> Iterator[Finding]:
    """Layers, granularity and orientation of a trained artifact."""
    manifest, tensors = artifact.manifest, plan.source.tensors
    coded = {name.removesuffix(".weight") for name, entry in tensors.items() if entry.dtype == "F8_E4M3"}
    stated = {layer.name for layer in manifest.layers if layer.converted}
    for name in sorted(coded ^ stated):
        why = "holds FP8 codes, and the manifest does not say so" if name in coded else "holds no FP8 codes"
        yield Finding(Check.MANIFEST, name, why)
    transposed = {name.removesuffix(".weight") for name in manifest.details_of(TunedDetails).transposed}
    for unit in plan.units:
        stem = unit.entry.name.removesuffix(".weight")
        if stem in coded and unit.transposed != (stem in transposed):
            why = f"the manifest says transposed={stem in transposed}, the model says {unit.transposed}"
            yield Finding(Check.MANIFEST, unit.entry.name, why)
    shapes = {layer.name: layer.shape for layer in manifest.layers if layer.shape is not None}
    for name in sorted(coded & shapes.keys()):
        shape = tensors[f"{name}.weight"].shape
        if shapes[name] not in (shape, shape[::-1]):
            yield Finding(Check.MANIFEST, name, f"the manifest says shape {shapes[name]}, it is {shape}")
    if (manifest.number_format is None) != (not coded):
        stated_format = manifest.number_format.name if manifest.number_format else "no number format"
        yield Finding(Check.MANIFEST, "number_format", f"the manifest says {stated_format}; {len(coded)} layers "
                          "hold FP8 codes")  # fmt: skip
    elif manifest.number_format is not None and manifest.number_format.name != "e4m3":
        yield Finding(Check.MANIFEST, "number_format", f"{manifest.number_format.name}; the files hold e4m3")
