"""What an export consists of: safetensors written as a stream, and everything of a checkpoint that is not a weight.

`safetensors.torch.save_file` wants the whole file in memory. The plan knows every dtype and shape beforehand, so the
header can be written first and peak memory is that of one weight, whatever the shard size. The format: 8 bytes of
header length (little endian), a JSON header, then tensor data without holes.

Tokenizer, chat template, generation config and licences are copied byte for byte: one character of a chat template
decides whether a fine-tuned model answers as trained. config.json is an exception: only its two keys that this exporter
owns may change. The other is `eos_token_id` of the generation config, where the end of the model's turns is missing.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from exporters.vllm.options import ExportFormat, quantization_config
from exporters.vllm.plan import Action, ExportPlan, Unit
from fp8pipe.artifact import disk_guard
from fp8pipe.models.checkpoint.sidecars import SERVED_FILES, copy_sidecars, sidecar_files
from fp8pipe.models.checkpoint.tensors import DTYPES, TensorHeader, read_tensor, shard_names, write_index
from fp8pipe.models.language.ending import GENERATION_FILE
from fp8pipe.numerics.grids import channel_scale, dequantize_weight, quantize_weight, to_bf16

CONFIG_NAME = "config.json"


def write_weights(plan: ExportPlan, root: Path, advance: Callable[[], None] = lambda: None) -> None:
    """Write every shard of a plan that passed the linter, and the index when there is more than one.

    Raises:
        OutOfMemoryError: the disk is too small or fills up (exit code 15).
    """
    names = shard_names(len(plan.shards))
    with disk_guard(root, plan.payload_bytes):
        for name, units in zip(names, plan.shards, strict=True):
            _write_shard(root / name, units, advance)
    if len(names) > 1:
        placed = [(name, unit) for name, units in zip(names, plan.shards, strict=True) for unit in units]
        weight_map = {output.name: name for name, unit in placed for output in unit.outputs}
        write_index(root, weight_map, plan.payload_bytes)


def _write_shard(path: Path, units: Sequence[Unit], advance: Callable[[], None]) -> None:
    header, offsets = _layout([output for unit in units for output in unit.outputs])
    with path.open("wb") as handle:
        handle.write(len(header).to_bytes(8, "little"))
        handle.write(header)
        start = handle.tell()
        for unit in units:
            for name, tensor in _produce(unit).items():
                handle.seek(start + offsets[name])
                if tensor.numel():
                    handle.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            advance()
        handle.flush()
        os.fsync(handle.fileno())


def _layout(outputs: Sequence[TensorHeader]) -> tuple[bytes, dict[str, int]]:
    """The padded JSON header, and each tensor's offset into the data; wide dtypes first, for alignment."""
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


def _produce(unit: Unit) -> dict[str, Tensor]:
    """The output tensors of a unit that passed the linter, by name, on the CPU: the codec applied to the source.

    Raises:
        ValueError: a tensor came out with another shape than planned (a defect of this exporter).
    """
    weight = read_tensor(unit.entry)
    if unit.action is Action.QUANTIZE:
        tensors = list(quantize_weight(weight, transposed=unit.transposed))
    elif unit.action is Action.CODES:
        tensors = [weight, channel_scale(_scale(unit), unit.outputs[1].shape[0])]
    elif unit.action is Action.DEQUANTIZE:
        tensors = [to_bf16(dequantize_weight(weight, _scale(unit), transposed=unit.transposed))]
    elif unit.action is Action.CAST:
        tensors = [to_bf16(weight)]
    else:
        tensors = [weight]
    for tensor, output in zip(tensors, unit.outputs, strict=True):
        if tuple(tensor.shape) != output.shape:
            raise ValueError(f"{output.name}: planned {output.shape}, produced {tuple(tensor.shape)}")
    return {output.name: tensor for output, tensor in zip(unit.outputs, tensors, strict=True)}


def _scale(unit: Unit) -> Tensor:
    if unit.scale is None:
        raise ValueError(f"{unit.entry.name}: FP8 codes without a scale passed the linter")
    return read_tensor(unit.scale)


def auxiliary_warnings(root: Path) -> list[str]:
    """What serving will miss, in words for the manifest."""
    names = {path.name for path in sidecar_files(root, SERVED_FILES)}
    if not any(name.startswith(("tokenizer", "vocab")) for name in names):
        return ["the source holds no tokenizer: the engine must be given one (--tokenizer)"]
    path = root / "tokenizer_config.json"
    inside = path.is_file() and '"chat_template"' in path.read_text(encoding="utf-8")
    if inside or any(name.startswith("chat_template") for name in names):
        return []
    return ["the tokenizer has no chat template: the chat endpoint will refuse, completions work"]


def export_config(plan: ExportPlan) -> dict[str, object]:
    """The export's config.json: the source's, with `quantization_config` set and, for bf16, the dtype."""
    config: dict[str, object] = {k: v for k, v in plan.source.config.items() if k != "quantization_config"}
    block = quantization_config(plan.options.format, plan.ignore, plan.schema)
    if block is not None:
        config["quantization_config"] = block
    if plan.options.format is ExportFormat.BF16:
        for key in [k for k in ("dtype", "torch_dtype") if k in config] or ["dtype"]:
            config[key] = "bfloat16"
    return config


def write_auxiliary(plan: ExportPlan, root: Path) -> None:
    """Copy the auxiliary files and write config.json (byte for byte when nothing in it changes)."""
    source = plan.source.root
    copy_sidecars(source, root, SERVED_FILES)
    if plan.ending.settings is not None:
        (root / GENERATION_FILE).write_text(plan.ending.text, encoding="utf-8")
    config = export_config(plan)
    if config == plan.source.config and plan.source.parent.stored is None:
        shutil.copyfile(source / CONFIG_NAME, root / CONFIG_NAME)
    else:
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (root / CONFIG_NAME).write_text(text, encoding="utf-8")
