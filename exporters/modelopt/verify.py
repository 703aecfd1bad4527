"""Checks for checkpoints in ModelOpt's layout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from exporters.modelopt.checkpoint import checkpoint_layers, checkpoint_tensors
from exporters.modelopt.target import ModeloptDetails
from exporters.tensorrt.language.source import open_language
from exporters.verify.common import compare_files, compare_json, compare_layers
from exporters.vllm.kv_cache import is_kv_scale, kv_scales
from exporters.vllm.modelopt import CACHE_SCHEME, QUANT_FILE, quant_file
from exporters.vllm.verify import stray_weights, unexpected_tensors
from fp8pipe.artifact import MANIFEST_NAME, Artifact
from fp8pipe.artifact.finding import Check, Finding
from fp8pipe.models.checkpoint.sidecars import SERVED_FILES, sidecar_files
from fp8pipe.models.checkpoint.tensors import TensorEntry, read_tensor, weight_entries
from fp8pipe.models.language.structure import read_structure
from fp8pipe.numerics.grids import same_bits


def check_modelopt(artifact: Artifact, parent: Path | None, notes: list[str]) -> Iterator[Finding]:
    """Check codes, scales and both configurations, and compare every tensor with the parent's."""
    tensors = weight_entries(artifact.root)
    yield from stray_weights(artifact.root, tensors)
    yield from unexpected_tensors(tensors, read_structure(artifact.root))
    for name, entry in tensors.items():
        yield from _values(name, entry, tensors)
    yield from _configs(artifact)
    if parent is not None:
        yield from _against(artifact, tensors, parent)


def _values(name: str, entry: TensorEntry, tensors: dict[str, TensorEntry]) -> Iterator[Finding]:
    if entry.dtype == "F8_E4M3":
        nan = int(((read_tensor(entry).view(torch.uint8) & 0x7F) == 0x7F).sum())
        if nan:
            yield Finding(Check.LINT, name, f"{nan} codes are NaN (nan-code)")
        if f"{name}_scale" not in tensors:
            yield Finding(Check.LINT, name, "FP8 codes without a scale (missing-scale)")
    elif name.endswith(("weight_scale", "input_scale")) or is_kv_scale(name):
        scale = read_tensor(entry)
        if entry.dtype != "F32":
            yield Finding(Check.LINT, name, f"a scale of {entry.dtype}; expected F32 (scale-shape)")
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            yield Finding(Check.LINT, name, "a scale is not a positive number (scale)")
    elif not bool(torch.isfinite(read_tensor(entry).float()).all()):
        yield Finding(Check.LINT, name, "holds NaN or infinity (not-finite)")


def _configs(artifact: Artifact) -> Iterator[Finding]:
    """Compare hf_quant_config.json and config.json's block with the manifest's algorithm and layers."""
    manifest, details = artifact.manifest, artifact.manifest.details_of(ModeloptDetails)
    excluded = [layer.name for layer in manifest.layers if not layer.converted]
    cache = artifact.manifest.config.get("kv_cache")
    expected = quant_file(details.quant_algo, excluded, None if cache is None else str(cache))
    found = json.loads((artifact.root / QUANT_FILE).read_text(encoding="utf-8"))
    yield from compare_json(found.get("quantization"), expected["quantization"], QUANT_FILE, "quantization")
    block = json.loads((artifact.root / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    said = {key: block.get(key) for key in ("quant_method", "quant_algo", "ignore", "kv_cache_scheme")}
    wanted: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": details.quant_algo, "ignore": excluded}
    wanted["kv_cache_scheme"] = None if cache is None else CACHE_SCHEME
    yield from compare_json(said, wanted, "config.json", "quantization_config")


def _against(artifact: Artifact, tensors: dict[str, TensorEntry], parent: Path) -> Iterator[Finding]:
    model = open_language(parent)
    details = artifact.manifest.details_of(ModeloptDetails)
    scales = details.activation_scales
    cache = {} if details.kv_cache is None else kv_scales(model.plan.source.kv_ranges, str(parent))
    said, derived = ({k: s.model_dump() for k, s in found.items()} for found in (details.kv_cache or {}, cache))
    yield from compare_json(said, derived, MANIFEST_NAME, "details.kv_cache")
    expected = dict(checkpoint_tensors(model, details.quant_algo, scales, cache))
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors or name not in expected:
            why = "it is missing" if name not in tensors else "no export writes such a tensor"
            yield Finding(Check.PARITY, name, why)
        elif not same_bits(read_tensor(tensors[name]), expected[name]):
            yield Finding(Check.PARITY, name, "its dtype, shape or bits do not follow from the parent")
    calibration = str(artifact.manifest.config.get("calibration", "amax"))
    yield from compare_layers(artifact.manifest, checkpoint_layers(model, details.quant_algo, calibration))
    yield from compare_files(
        artifact.root, parent, sidecar_files(artifact.root, SERVED_FILES), sidecar_files(parent, SERVED_FILES)
    )
    ours = json.loads((artifact.root / "config.json").read_text(encoding="utf-8"))
    ours.pop("quantization_config", None)
    for found in compare_json(ours, model.plan.source.config, "config.json"):
        yield Finding(Check.PARITY, found.where, found.why)
