"""Writes checkpoints in the layout of NVIDIA ModelOpt's unified checkpoints, for TensorRT-LLM, vLLM and SGLang.

Two of its FP8 algorithms can hold an artifact's codes unchanged:

* `FP8`: one scale per weight (`weight_scale`, `()`), one static scale per input (`input_scale`, `()`), both float32.
* `FP8_PER_CHANNEL_PER_TOKEN`: one scale per row (`(out,)`), inputs quantized at run time.

Inference engines merge queries, keys and values, and gate and up, into one matrix multiplication. In `FP8` it has a
single scale, and an engine that finds several rounds all codes again to the largest. So `FP8` is written only if the
scales within each group are equal, as after training with shared scales; otherwise the other algorithm is used, with
each scale repeated for all rows, and the manifest says so. Nothing is rounded here.

An FP8 key/value cache has two scales per attention layer, `k_proj.k_scale` and `v_proj.v_scale` (`()`, float32).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exporters.modelopt.target import KIND, ModeloptDetails, ModeloptExportOptions
from exporters.tensorrt.language.calibrate import count_inputs, scales_by_layer
from exporters.tensorrt.language.source import LanguageModel, language_records, open_language
from exporters.tensorrt.language.target import InputScale
from exporters.text import read_text
from exporters.vllm.kv_cache import check_projections, cost_gate, is_kv_scale, kv_scales, scale_tensors
from exporters.vllm.modelopt import QUANT_FILE, quant_file, settings_block
from exporters.vllm.plan import fused_siblings
from exporters.vllm.target import KvScale
from fp8pipe.artifact import Artifact, ArtifactWriter, Gate, LayerRecord, NumberFormat, check_place, disk_guard, none_of
from fp8pipe.core.progress import track
from fp8pipe.core.version import __version__
from fp8pipe.models.checkpoint.sidecars import SERVED_FILES, copy_sidecars
from fp8pipe.models.checkpoint.tensors import shard_names, write_index
from fp8pipe.numerics.grids import same_bits
from fp8pipe.numerics.kinds import Kind
from fp8pipe.report.card import CardFacts, commit_export

_PER_TENSOR: Final = "FP8"
_PER_CHANNEL: Final = "FP8_PER_CHANNEL_PER_TOKEN"
_SHARD_BYTES: Final = 5_000_000_000

_CARD: Final = CardFacts(
    "Model Optimizer", "TensorRT-LLM",
    ("The checkpoint was compared with its source bit for bit; TensorRT-LLM itself was not run.",),
    "Serve this directory with an engine that reads ModelOpt checkpoints, for instance TensorRT-LLM's `trtllm-serve`.",
)  # fmt: skip


def export_checkpoint(source: Path, output: Path, options: ModeloptExportOptions) -> Artifact:
    """Write the checkpoint, reopen it, and compare it with the artifact bit for bit.

    `source` is an artifact of kind `falqon`; `output` receives safetensors, `hf_quant_config.json`, config.json,
    tokenizer files and a manifest.

    Raises:
        ConfigurationError, BadArtifactError, LintFindingsError: as `export_language`.
        GateFailedError: what was written differs from its source; nothing is committed.
    """
    check_place(output, force=options.force)
    model = open_language(source)
    # Groups of layers that engines merge into one and whose scales differ.
    groups = fused_siblings(model.weights, model.plan.schema.fused_groups)
    uneven = [g for g in groups if len({tuple(model.weights[n].scale.reshape(-1).tolist()) for n in g}) > 1]
    algorithm = _PER_TENSOR if model.per_tensor and not uneven else _PER_CHANNEL
    cache = {} if options.kv_cache is None else kv_scales(model.plan.source.kv_ranges, str(source))
    with track(2, "export") as progress:
        text, scales = None, None
        if algorithm == _PER_TENSOR:
            text = read_text(
                model.root, model.artifact, options.calibration_data, options.calibration_records, heldout=False
            )
            counts = count_inputs(model.torch_model(torch.float32), list(model.weights), text.calibration)
            scales = scales_by_layer(counts, options.calibration)
        progress.advance(1)
        with ArtifactWriter(output, kind=KIND, stage="export", force=options.force) as writer:
            if model.per_tensor and uneven:
                writer.warn(
                    f"{len(uneven)} group(s) of layers that engines fuse have unequal scales, the first: "
                    f"{', '.join(uneven[0])}; written with one scale per row, so that no code is rounded again"
                )
            tensors = dict(checkpoint_tensors(model, algorithm, scales, cache))
            _save(tensors, writer.root)
            _write_configs(model, algorithm, writer.root, options.kv_cache)
            gates = _compare(tensors, model, writer.root)
            if cache and model.plan.source.kv_ranges is not None:
                gates.append(cost_gate(model.plan.source.kv_ranges))
            writer.require_gates(
                gates, "the written checkpoint differs from its source", f"inspect what was written in {writer.root}"
            )
            progress.advance(1)
            details = ModeloptDetails(
                format=options.format, quant_algo=algorithm, calibration=None if text is None else text.facts,
                activation_scales=scales, kv_cache=cache or None,
            )  # fmt: skip
            return commit_export(
                writer, _CARD, model.artifact, options, format=options.format, details=details,
                layers=checkpoint_layers(model, algorithm, options.calibration),
                number_format=NumberFormat(
                    name=Kind.E4M3.value, granularity="per-tensor" if algorithm == _PER_TENSOR else "per-channel"
                ),
                runtime={"engine": "tensorrt-llm", "layout": "modelopt", "tested": False},
            )  # fmt: skip


def checkpoint_tensors(
    model: LanguageModel, algorithm: str, scales: Mapping[str, InputScale] | None, cache: Mapping[str, KvScale]
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint: the artifact's codes and floats, scales in the form of the algorithm.

    Raises:
        ConfigurationError: scales of a key/value cache for layers without k_proj and v_proj.
    """
    yield from model.floats.items()
    check_projections(cache, model.plan.source.tensors, str(model.root))
    for key, number in scale_tensors(cache, beside_projections=True).items():
        yield key, torch.tensor(number, dtype=torch.float32)
    for unit in model.plan.units:
        if unit.module is None or unit.module not in model.weights:
            continue
        weight = model.weights[unit.module]
        name = unit.entry.name.removesuffix(".weight")
        yield unit.entry.name, weight.codes
        rows = weight.codes.shape[0]
        scale = weight.scale if algorithm == _PER_TENSOR else weight.scale.expand(rows)
        yield f"{name}.weight_scale", scale.clone().contiguous()
        if scales is not None:
            yield f"{name}.input_scale", torch.tensor(scales[unit.module].scale, dtype=torch.float32)


def _write_configs(model: LanguageModel, algorithm: str, root: Path, kv_cache: str | None) -> None:
    """Write the quantization config to both places where engines look for it, and tokenizer files byte for byte."""
    producer = {"name": "fp8pipe", "version": __version__}
    config = quant_file(algorithm, model.plan.ignore, kv_cache, producer=producer)
    (root / QUANT_FILE).write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
    form = {"dynamic": False, "num_bits": 8, "type": "float"}
    group = {"input_activations": form, "weights": form} if algorithm == _PER_TENSOR else None
    merged = {**model.plan.source.config, "quantization_config": settings_block(config, group)}
    (root / "config.json").write_text(json.dumps(merged, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    copy_sidecars(model.root, root, SERVED_FILES)


def _save(tensors: Mapping[str, Tensor], root: Path) -> None:
    """Write one file, or several and an index."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        if sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > _SHARD_BYTES and shards[-1]:
            shards.append({})
        shards[-1][name] = tensor.contiguous()
    names = shard_names(len(shards))
    total = sum(tensor.nbytes for tensor in tensors.values())
    with disk_guard(root, total):
        for name, shard in zip(names, shards, strict=True):
            save_file(shard, root / name, metadata={"format": "pt"})
    if len(shards) > 1:
        placed = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        write_index(root, placed, total)


def _compare(tensors: Mapping[str, Tensor], model: LanguageModel, root: Path) -> list[Gate]:
    """Compare the files, read back, with the artifact."""
    found: dict[str, Tensor] = {}
    for file in sorted(root.glob("*.safetensors")):
        found |= load_file(file)
    codes = floats = scales = 0
    for unit in model.plan.units:
        stored = found.get(unit.entry.name)
        if unit.module is not None and unit.module in model.weights:
            weight, name = model.weights[unit.module], unit.entry.name.removesuffix(".weight")
            same = stored is not None and same_bits(stored, weight.codes)
            codes += 0 if same else weight.codes.numel()
            scale = found.get(f"{name}.weight_scale")
            scales += int(scale is None or not bool((scale == weight.scale).all()))
        else:
            floats += int(stored is None or not same_bits(stored, model.floats[unit.entry.name]))
    cached = [name for name in tensors if is_kv_scale(name)]
    wrong = [name for name in cached if name not in found or not same_bits(found[name], tensors[name])]
    unplanned = len(set(found) ^ set(tensors))
    return [
        none_of("weight codes differing", codes, f"of {sum(w.codes.numel() for w in model.weights.values())}"),
        none_of("weight scales differing", scales, f"of {len(model.weights)} layers"),
        none_of("copied tensors differing", floats, f"of {len(model.floats)}, bit for bit"),
        none_of("tensors not as planned", unplanned, f"of {len(tensors)}"),
        *([none_of("scales of the key/value cache differing", len(wrong), f"of {len(cached)}")] if cached else []),
    ]


def checkpoint_layers(model: LanguageModel, algorithm: str, calibration: str = "amax") -> list[LayerRecord]:
    """The artifact's records with scales as written: per row; or per tensor, with a static scale for inputs."""
    if algorithm == _PER_CHANNEL:
        return list(model.plan.layers)
    return language_records(model, calibration)
