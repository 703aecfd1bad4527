"""Checks the contents of an artifact: an export by its target's check, a trained or quantized model by those here."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from exporters.graph.formats import OnnxFormat
from exporters.graph.lint import lint_model
from exporters.target import Reference, call, target_of
from exporters.verify.common import compare_encodings, compare_json, compare_layers, lint_findings
from exporters.vllm.export import plan_export
from exporters.vllm.lint import lint
from exporters.vllm.options import ExportFormat, VllmExportOptions
from exporters.vllm.verify import stray_weights, unexpected_tensors
from fp8pipe.artifact import Artifact, Encoding
from fp8pipe.artifact.finding import Check, Finding, LintFindingsError
from fp8pipe.artifact.kinds import TUNED_KINDS, VIT_KIND, TunedDetails
from fp8pipe.artifact.manifest import Granularity
from fp8pipe.core.errors import BadArtifactError, ConfigurationError, MissingCapabilityError, class_and_one_line
from fp8pipe.models.checkpoint.packed import PackedEntry
from fp8pipe.models.checkpoint.tensors import TensorEntry
from fp8pipe.models.vision.preprocessing import PREPROCESSING_FILE
from fp8pipe.models.vision.quantized import layer_records, load_quantized
from fp8pipe.numerics.kinds import Kind, granularity


def check_contents(artifact: Artifact, parent: Path | None) -> tuple[list[Finding], list[str]]:
    """Check an artifact whose files match the hashes in its manifest.

    Args:
        artifact: an opened artifact.
        parent: directory of the artifact or model that it was made from, if available.

    Returns:
        Findings, and notes on what could not be checked.
    """
    checks: dict[str, Reference] = {**dict.fromkeys(TUNED_KINDS, _check_tuned), VIT_KIND: _check_vit}
    target = target_of(artifact.kind)
    check = checks.get(artifact.kind) if target is None else target.verify
    if check is None:
        return [], [f"contents not checked: this version has no check for artifacts of kind {artifact.kind!r}"]
    findings: list[Finding] = []
    notes: list[str] = []
    try:
        for found in call(check, artifact, parent, notes):
            if found not in findings:
                findings.append(found)
    except LintFindingsError as error:
        findings += lint_findings(error.findings)
    except (BadArtifactError, ConfigurationError) as error:
        findings.append(Finding(Check.REOPEN, error.what, error.why))
    except MissingCapabilityError as error:
        notes.append(f"contents not checked: {error.what} ({error.fix})")
    except (ValueError, KeyError, TypeError, OSError, RuntimeError, SafetensorError) as error:
        # The files have the recorded hashes but cannot be read, so they were already wrong when they were hashed.
        why = class_and_one_line(error, 400)
        named = _no_json(artifact) or [(artifact.kind, f"its files are inconsistent with each other: {why}")]
        findings += [Finding(Check.REOPEN, where, said) for where, said in named]
    return findings, notes


def _no_json(artifact: Artifact) -> list[tuple[str, str]]:
    """The artifact's .json files that do not hold valid JSON, each with the reason."""
    found = []
    for entry in artifact.manifest.files:
        if entry.path.endswith(".json"):
            try:
                json.loads((artifact.root / entry.path).read_bytes())
            except ValueError as error:
                found.append((entry.path, f"it is not JSON: {error}"))
    return found


def _check_vit(artifact: Artifact, parent: Path | None, notes: list[str]) -> Iterator[Finding]:
    """Check an artifact of `quantize-vit`: values, preprocessing, and the manifest's layer records."""
    quantized = load_quantized(artifact.root)
    yield from lint_findings(lint_model(quantized, OnnxFormat.QDQ, runtime=False))
    manifest = artifact.manifest
    if manifest.preprocessing is not None:
        found = quantized.preprocessing.model_dump(mode="json")
        yield from compare_json(found, manifest.preprocessing, PREPROCESSING_FILE)
    if manifest.layers:
        yield from compare_layers(manifest, layer_records(quantized, manifest.layers))
    kinds = {weight.kind for weight in quantized.weights.values()}
    kind = next((kind for kind in (Kind.NVFP4, Kind.E4M3) if kind in kinds), Kind.INT)
    stated = manifest.number_format
    if stated is not None and stated.granularity != granularity(kind):
        why = f"the manifest says {stated.granularity}; the files hold {kind} codes, {granularity(kind)}"
        yield Finding(Check.MANIFEST, "number_format", why)


def _check_tuned(artifact: Artifact, parent: Path | None, notes: list[str]) -> Iterator[Finding]:
    """Check an artifact of `finetune`: values, shapes, adapter, and the manifest's layer records."""
    # With format bf16 the linter applies only the rules that hold for every format; it does not take NVFP4. The files
    # were already hashed.
    number = artifact.manifest.number_format
    form = ExportFormat.NVFP4 if number is not None and number.name == "nvfp4" else ExportFormat.BF16
    plan = plan_export(artifact.root, VllmExportOptions(format=form), verify=False)
    yield from lint_findings(lint(plan))
    yield from unexpected_tensors(plan.source.tensors, plan.structure)
    yield from stray_weights(artifact.root, plan.source.tensors, ("adapter.safetensors",))
    # Compare the manifest's statements on layers, orientation, shapes and number format with the files.
    manifest, tensors = artifact.manifest, plan.source.tensors
    packed = {name.removesuffix(".weight") for name, entry in tensors.items() if isinstance(entry, PackedEntry)}
    coded = packed | {name.removesuffix(".weight") for name, entry in tensors.items() if entry.dtype == "F8_E4M3"}
    stated = {layer.name for layer in manifest.layers if layer.converted}
    for name in sorted(coded ^ stated):
        why = "holds codes, and the manifest does not say so" if name in coded else "holds no codes"
        yield Finding(Check.MANIFEST, name, why)
    transposed = {name.removesuffix(".weight") for name in manifest.details_of(TunedDetails).transposed}
    for unit in plan.units:
        stem = unit.entry.name.removesuffix(".weight")
        if stem in coded and unit.transposed != (stem in transposed):
            why = f"the manifest says transposed={stem in transposed}, the model says {unit.transposed}"
            yield Finding(Check.MANIFEST, unit.entry.name, why)
    for layer in manifest.layers:
        name, shape = layer.name, tensors[f"{layer.name}.weight"].shape if layer.name in coded else None
        if shape is not None and layer.shape not in (None, shape, shape[::-1]):
            yield Finding(Check.MANIFEST, name, f"the manifest says shape {layer.shape}; in the files it is {shape}")
        scale = tensors.get(f"{name}.weight_scale")
        if layer.weight is not None and (name in packed or (shape is not None and scale is not None)):
            stored = _encoding(scale).model_copy(update={"scale_rule": layer.weight.scale_rule})
            yield from compare_encodings(manifest, name, "weight", layer.weight, stored)
    if (manifest.number_format is None) != (not coded):
        stated_format = manifest.number_format.name if manifest.number_format else "no number format"
        why = f"the manifest says {stated_format}; {len(coded)} layers hold codes"
        yield Finding(Check.MANIFEST, "number_format", why)
    elif number is not None and number.name != (held := "nvfp4" if packed else "e4m3"):
        yield Finding(Check.MANIFEST, "number_format", f"{number.name}; the files hold {held}")


def _encoding(scale: TensorEntry | None) -> Encoding:
    """How a tuned weight is stored: in FP8 with this scale; without one, in NVFP4."""
    if scale is None:
        return Encoding(format="nvfp4", bits=4, granularity="per-block")
    per: Granularity = "per-tensor" if math.prod(scale.shape) == 1 else "per-channel"
    return Encoding(format="e4m3", bits=8, granularity=per)
