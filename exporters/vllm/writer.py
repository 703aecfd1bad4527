"""Writes the files of an export: safetensors as a stream, and all files of a checkpoint that are not weights.

`safetensors.torch.save_file` needs the whole file in memory. The plan knows every dtype and shape in advance, so the
header can be written first, and only a few blocks of rows are in memory, whatever the size of a shard or a weight. The
source is read once for linting and writing, so what is written is exactly what was linted. The format: 8 bytes of
header length (little endian), a JSON header, then tensor data without gaps.

Tokenizer, chat template, generation config and licences are copied byte for byte: a single changed character in a chat
template can make a fine-tuned model answer differently than trained. Only two things are changed: the quantization
block and the dtype in config.json, and `eos_token_id` in generation_config.json if it lacks the end-of-turn token.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from exporters.vllm.blocks import block_rows, by_unit, scale_of
from exporters.vllm.modelopt import QUANT_FILE, nvfp4_settings
from exporters.vllm.nvfp4 import packed_tensors
from exporters.vllm.options import ExportFormat, quantization_config
from exporters.vllm.plan import Action, ExportPlan, Unit
from exporters.vllm.resume import ExportProgress
from exporters.vllm.values import count_bad, value_findings
from fp8pipe.artifact import disk_guard
from fp8pipe.artifact.finding import Finding
from fp8pipe.models.checkpoint.rows import read_rows
from fp8pipe.models.checkpoint.sidecars import SERVED_FILES, copy_sidecars, read_config, sidecar_files
from fp8pipe.models.checkpoint.tensors import DTYPES, TensorEntry, TensorHeader, shard_names, write_index
from fp8pipe.models.language.ending import GENERATION_FILE
from fp8pipe.numerics.blocks import block_scale, quantize_blocks
from fp8pipe.numerics.grids import channel_scale, dequantize_weight, quantize_weight, to_bf16

CONFIG_NAME = "config.json"
PROCESSOR_FILES: Final = ("preprocessor_config.json", "processor_config.json")  # either says how images are prepared


def write_weights(
    plan: ExportPlan, root: Path, advance: Callable[[], None] = lambda: None, progress: ExportProgress | None = None
) -> list[Finding]:
    """Write and lint every shard of a plan, and the index if there is more than one shard.

    Weights in NVFP4 need their global scales first (`nvfp4.with_global_scales`).

    Args:
        plan: a plan whose structure passed the linter.
        root: where the shards are written.
        advance: called once per unit.
        progress: shards kept from an earlier run; each finished shard is recorded in it.

    Returns:
        The linter's findings about values; if there are any, the written files must be discarded.

    Raises:
        OutOfMemoryError: the disk is too small or fills up (exit code 15).
    """
    names = shard_names(len(plan.shards))
    added = [TensorHeader(name, "F32", plan.layout.shape) for name in plan.added_tensors]
    kept = frozenset() if progress is None else progress.finished
    todo = [(name, units) for name, units in zip(names, plan.shards, strict=True) if name not in kept]
    findings: list[Finding] = []
    # A finished shard is flushed to disk while the next one is written.
    with (
        disk_guard(root, sum(unit.size_bytes for _, units in todo for unit in units)),
        ThreadPoolExecutor(1) as disk,
    ):
        flushed = []
        for name, units in todo:
            scales = list(zip(added, plan.added_tensors.values(), strict=True)) if name == names[-1] else []
            findings += _write_shard(root / name, units, scales, advance, sound=not findings)
            flushed.append(disk.submit(_flush, root / name, progress if not findings else None))
        for one in flushed:
            one.result()
        for unit, bad in by_unit(plan.dropped, lambda unit, rows: count_bad(read_rows(unit.entry, rows))):
            findings += value_findings(unit, sum(bad))
    if len(names) > 1:
        placed = [(name, unit) for name, units in zip(names, plan.shards, strict=True) for unit in units]
        weight_map = {output.name: name for name, unit in placed for output in unit.outputs}
        write_index(root, weight_map | dict.fromkeys(plan.added_tensors, names[-1]), plan.payload_bytes)
    return findings


def _write_shard(
    path: Path, units: Sequence[Unit], scales: Sequence[tuple[TensorHeader, float]], advance: Callable[[], None],
    sound: bool,
) -> list[Finding]:  # fmt: skip
    """Write a shard, unless the export has already been refused (not `sound`); returns findings about its values.

    `scales` are tensors without a source: fp32, one number.
    """
    header, offsets = _layout([*(output for unit in units for output in unit.outputs), *(head for head, _ in scales)])
    start = 8 + len(header)
    findings: list[Finding] = []
    with path.open("wb") as handle:
        handle.write(len(header).to_bytes(8, "little") + header)
        handle.flush()
        handle.truncate(start + sum(unit.size_bytes for unit in units) + 4 * len(scales))
        descriptor = handle.fileno()
        for head, scale in scales:
            _write_at(descriptor, start + offsets[head.name], torch.tensor([scale], dtype=torch.float32))

        def work(unit: Unit, rows: range) -> int:
            block = read_rows(unit.entry, rows)
            bad = count_bad(block)
            if sound and not bad:
                for output, place, tensor in _produce(unit, rows, block):
                    _write_at(descriptor, start + offsets[output.name] + place, tensor)
            return bad

        for unit, bad in by_unit(units, work):
            findings += value_findings(unit, sum(bad))
            sound = sound and not findings
            advance()
    return findings


def _write_at(descriptor: int, place: int, tensor: Tensor) -> None:
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
    while len(data):  # one call may write only a part
        written = os.pwrite(descriptor, data, place)
        data, place = data[written:], place + written


def _flush(path: Path, progress: ExportProgress | None) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
    if progress is not None:
        progress.add(path)


def _layout(outputs: Sequence[TensorHeader]) -> tuple[bytes, dict[str, int]]:
    """The padded JSON header, and each tensor's offset into the data; wider dtypes first, for alignment."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: dict[str, int] = {}
    position = 0
    for output in sorted(outputs, key=lambda o: (-DTYPES[o.dtype].itemsize, o.name)):
        end = position + output.size_bytes
        header[output.name] = {"dtype": output.dtype, "shape": list(output.shape), "data_offsets": [position, end]}
        offsets[output.name] = position
        position = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    return text + b" " * (-len(text) % 8), offsets


def _produce(unit: Unit, rows: range, values: Tensor) -> list[tuple[TensorHeader, int, Tensor]]:
    """Convert some of a unit's rows; returns header, byte offset within the tensor, and values of each output.

    Raises:
        ValueError: the values have a different shape than planned (a bug in this exporter).
    """
    if unit.packed:
        return packed_tensors(unit, rows, values)
    if unit.action is Action.QUANTIZE:
        tensors = list(_quantized(unit, values))
    elif unit.action is Action.CODES:
        tensors = [values, _repeated(unit, rows, scale_of(_scale(unit), unit, rows))]
    elif unit.action is Action.DEQUANTIZE:
        scale = scale_of(_scale(unit), unit, rows)
        tensors = [to_bf16(dequantize_weight(values, scale, transposed=unit.transposed))]
    else:
        tensors = [to_bf16(values) if unit.action is Action.CAST else values]
    produced = []
    for output, tensor in zip(unit.outputs, tensors, strict=True):
        is_scale = output is not unit.outputs[0]
        here = block_rows(rows, unit.block) if is_scale and unit.block is not None else rows
        row, length = (output.shape[1:], len(here)) if output.shape else ((), 1)
        if unit.transposed and is_scale:
            length, tensor = output.shape[0], tensor.reshape(output.shape)  # of an expert: (1, out)
        if tuple(tensor.shape) != ((length, *row) if output.shape else ()):
            raise ValueError(f"{output.name}: planned {output.shape}, rows {rows} came out as {tuple(tensor.shape)}")
        place = here.start * math.prod(row) * DTYPES[output.dtype].itemsize
        produced.append((output, place, tensor))
    return produced


def _quantized(unit: Unit, values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of some of a unit's rows, rounded by this export."""
    if unit.block is not None:
        return quantize_blocks(values, unit.block)
    return quantize_weight(values, transposed=unit.transposed)


def _repeated(unit: Unit, rows: range, scale: Tensor) -> Tensor:
    """The source's scale, repeated for each row or each block of some of a unit's rows."""
    if unit.block is not None:
        return block_scale(scale, (len(rows), unit.entry.shape[1]), unit.block)
    return channel_scale(scale, unit.entry.shape[1] if unit.transposed else len(rows))


def _scale(unit: Unit) -> TensorEntry:
    if unit.scale is None:
        raise ValueError(f"{unit.entry.name}: FP8 codes without a scale passed the linter")
    return unit.scale


def auxiliary_warnings(root: Path) -> list[str]:
    """Warnings for the manifest about missing files without which serving is limited or impossible."""
    names = {path.name for path in sidecar_files(root, SERVED_FILES)}
    return [*_processor_warnings(root, names), *_tokenizer_warnings(root, names)]


def _processor_warnings(root: Path, names: set[str]) -> list[str]:
    if read_config(root / CONFIG_NAME).get("vision_config") is None or not names.isdisjoint(PROCESSOR_FILES):
        return []
    return [f"the model accepts images, and the source has none of {', '.join(PROCESSOR_FILES)}: vLLM will not start"]


def _tokenizer_warnings(root: Path, names: set[str]) -> list[str]:
    if not any(name.startswith(("tokenizer", "vocab")) for name in names):
        return ["the source has no tokenizer: give the engine one (--tokenizer)"]
    path = root / "tokenizer_config.json"
    inside = path.is_file() and '"chat_template"' in path.read_text(encoding="utf-8")
    if inside or any(name.startswith("chat_template") for name in names):
        return []
    return ["the tokenizer has no chat template: the chat endpoint will refuse requests, completions work"]


def export_config(plan: ExportPlan) -> dict[str, object]:
    """The export's config.json: the source's, with `quantization_config` set and, for bf16, the dtype."""
    config: dict[str, object] = {k: v for k, v in plan.source.config.items() if k != "quantization_config"}
    options = plan.options
    block = quantization_config(options.format, plan.ignore, plan.schema, options.kv_cache)
    if options.layout == "modelopt":
        _, block = modelopt_settings(plan)
    if block is not None:
        config["quantization_config"] = block
    if plan.options.format is ExportFormat.BF16:
        for key in [k for k in ("dtype", "torch_dtype") if k in config] or ["dtype"]:
            config[key] = "bfloat16"
    return config


def modelopt_settings(plan: ExportPlan) -> tuple[dict[str, Any], dict[str, Any]]:
    """`hf_quant_config.json` and `quantization_config` of an export in ModelOpt's layout."""
    return nvfp4_settings(plan.ignore, plan.options.kv_cache, inputs=plan.options.format.calibrated)


def write_auxiliary(plan: ExportPlan, root: Path) -> None:
    """Copy the auxiliary files and write config.json (byte for byte when nothing in it changes)."""
    source = plan.source.root
    copy_sidecars(source, root, SERVED_FILES)
    if plan.ending.settings is not None:
        (root / GENERATION_FILE).write_text(plan.ending.text, encoding="utf-8")
    if plan.options.layout == "modelopt":
        stated, _ = modelopt_settings(plan)
        (root / QUANT_FILE).write_text(json.dumps(stated, indent=4) + "\n", encoding="utf-8")
    config = export_config(plan)
    if config == plan.source.config and plan.source.parent.stored is None:
        shutil.copyfile(source / CONFIG_NAME, root / CONFIG_NAME)
    else:
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (root / CONFIG_NAME).write_text(text, encoding="utf-8")
