"""Safetensors written as a stream: header from the plan, then one tensor after another at its offset.

`safetensors.torch.save_file` wants the whole file in memory. The plan knows every dtype and shape beforehand,
so the header can be written first and peak memory is that of one weight, whatever the shard size. The format:
8 bytes of header length (little endian), a JSON header, then tensor data without holes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from exporters.vllm.plan import Action, ExportPlan, Unit
from fp8pipe.artifact import disk_guard
from fp8pipe.models.checkpoint.tensors import DTYPES, TensorHeader, read_tensor, shard_names, write_index
from fp8pipe.numerics.grids import channel_scale, dequantize_weight, quantize_weight, to_bf16

HEADER_ALIGNMENT = 8


def write_weights(plan: ExportPlan, root: Path, advance: Callable[[], None] = lambda: None) -> None:
    """Write every shard of the plan, and the index when there is more than one.

    Args:
        plan: a plan that passed the linter.
        root: an existing directory.
        advance: called once per weight, for progress.

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
                _write_tensor(handle, tensor)
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
    return text + b" " * (-len(text) % HEADER_ALIGNMENT), offsets


def _write_tensor(handle: BinaryIO, tensor: Tensor) -> None:
    if tensor.numel():
        handle.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


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
