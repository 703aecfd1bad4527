"""Safetensors files as a table of entries: headers first, one tensor at a time after.

Planning needs names, dtypes and shapes only; writing and comparing need one tensor in memory at once. Each
read opens the file anew, so no mapping outlives the tensor it served and memory stays near one tensor.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fp8pipe.core.errors import BadArtifactError

__all__ = ["DTYPES", "TensorEntry", "header_entries", "read_tensor", "weight_entries"]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# safetensors' spelling of each dtype this exporter can carry.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PLAIN_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint, from its file's header.

    Attributes:
        name: full tensor name.
        dtype: safetensors' dtype name, a key of `DTYPES`.
        shape: as stored.
        file: the file that holds it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def header_entries(file: Path) -> dict[str, TensorEntry]:
    """Entries of one file, read from its header alone.

    Raises:
        BadArtifactError: not a safetensors file, or a dtype this exporter does not carry.
    """
    entries: dict[str, TensorEntry] = {}
    try:
        with safe_open(str(file), framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
                part = handle.get_slice(name)
                entries[name] = TensorEntry(name, part.get_dtype(), tuple(part.get_shape()), file)
    except (OSError, SafetensorError) as error:
        raise BadArtifactError(
            f"{file} cannot be read as safetensors", why=str(error), fix="fetch or write it again"
        ) from error
    unknown = sorted({e.dtype for e in entries.values()} - DTYPES.keys())
    if unknown:
        raise BadArtifactError(
            f"{file} holds tensors of dtype {', '.join(unknown)}",
            why=f"this exporter carries {', '.join(DTYPES)}",
            fix="start from an unquantized checkpoint",
        )
    return entries


def weight_entries(root: Path) -> dict[str, TensorEntry]:
    """All tensors of a Hugging Face style directory: `model.safetensors`, or the shards of its index.

    Raises:
        BadArtifactError: no weights, an unreadable index, a shard missing, or an index that disagrees with
            the shards.
    """
    single, index = root / SINGLE_NAME, root / INDEX_NAME
    if single.is_file():
        return header_entries(single)
    if not index.is_file():
        raise BadArtifactError(
            f"{root} holds no weights",
            why=f"neither {SINGLE_NAME} nor {INDEX_NAME} is there",
            fix="save the model as safetensors (save_pretrained does)",
        )
    weight_map = _weight_map(index)
    entries: dict[str, TensorEntry] = {}
    for file_name in sorted(set(weight_map.values())):
        entries.update(header_entries(root / file_name))
    wrong = sorted(n for n, f in weight_map.items() if n not in entries or entries[n].file.name != f)
    wrong += sorted(entries.keys() - weight_map.keys())
    if wrong:
        raise BadArtifactError(
            f"{index} disagrees with its shards",
            why=f"{len(wrong)} tensor(s), the first: {wrong[0]}",
            fix="fetch or write the checkpoint again",
        )
    return entries


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = {str(k): str(v) for k, v in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadArtifactError(f"{index} is not a weight index", why=repr(error)) from error
    outside = [f for f in names.values() if Path(f).name != f]
    if outside:
        raise BadArtifactError(f"{index} points outside its directory", why=f"shard name {outside[0]!r}")
    return names


def read_tensor(entry: TensorEntry) -> Tensor:
    """The tensor itself, on the CPU, as stored (mapped from its file: do not write to it)."""
    with safe_open(str(entry.file), framework="pt") as handle:
        return handle.get_tensor(entry.name)
