"""Reads the safetensors files of a checkpoint: first the index and the headers, then tensors one at a time.

Planning needs only names, dtypes and shapes; writing and comparing need one tensor in memory at a time. Each read
reopens the file, so that no memory mapping outlives its tensor and memory use stays near the size of one tensor. Tensor
names are those of the checkpoint, not those of the model's modules, because transformers renames weights on loading.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fp8pipe.artifact import Parent, sha256_file
from fp8pipe.artifact.stored_format import StoredFormat
from fp8pipe.models.checkpoint.blame import unusable
from fp8pipe.models.checkpoint.sidecars import SERVED_FILES, sidecar_files, unique
from fp8pipe.models.checkpoint.weightless import weightless

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SCALE_SUFFIX = "_scale"  # a weight's scale is stored under the weight's name plus this suffix

# The dtypes that the exporters support, by their names in safetensors.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_SHOWN: Final = 3  # names listed in an error
PLAIN_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """Description of one tensor in the header of a safetensors file.

    Attributes:
        name: full tensor name.
        dtype: safetensors' dtype name, a key of `DTYPES`.
        shape: shape of the stored tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class TensorEntry(TensorHeader):
    """One tensor of a checkpoint and its location.

    Attributes:
        file: the safetensors file that contains the tensor.
        start: offset of the tensor's data in that file, in bytes.
    """

    file: Path
    start: int

    @property
    def by_rows(self) -> bool:
        """Whether a few rows can be read without reading the whole tensor."""
        return True

    def read(self) -> Tensor:
        """The tensor as stored, on the CPU. It is memory-mapped and must not be written to."""
        with safe_open(str(self.file), framework="pt") as handle:
            tensor: Tensor = handle.get_tensor(self.name)
        return tensor

    def read_rows(self, rows: range) -> Tensor:
        """Consecutive rows, read into memory; see `stored_rows`."""
        return stored_rows(self, self.dtype, rows)


def stored_rows(entry: TensorEntry, dtype: str, rows: range) -> Tensor:
    """Read consecutive rows of a tensor into memory, without memory mapping.

    Args:
        entry: the tensor.
        dtype: dtype of the stored data, a key of `DTYPES`.
        rows: indices along the first axis; `range(1)` for a scalar.

    Returns:
        A tensor `(len(rows), *shape[1:])`, or `()` for a scalar, on the CPU in the stored dtype.

    Raises:
        BadArtifactError, ConfigurationError: the file is shorter than its header says; see `unusable`.
    """
    kind = DTYPES[dtype]
    row_bytes = math.prod(entry.shape[1:]) * kind.itemsize
    shape = (len(rows), *entry.shape[1:]) if entry.shape else ()
    wanted = len(rows) * row_bytes
    if not wanted:
        return torch.empty(shape, dtype=kind)
    data = np.fromfile(entry.file, np.uint8, wanted, offset=entry.start + rows.start * row_bytes)
    if len(data) != wanted:
        why = f"{wanted} bytes of {entry.name} were asked for, {len(data)} were there"
        raise unusable(entry.file, f"{entry.file} was cut short while it was read", why=why, fix="fetch it again")
    return torch.from_numpy(data).view(kind).reshape(shape)


def header_entries(file: Path) -> dict[str, TensorEntry]:
    """The tensors in one safetensors file, by name and sorted by name; only the header is read.

    Raises:
        BadArtifactError, ConfigurationError: not a safetensors file, or truncated; see `unusable`.
    """
    try:
        with safe_open(str(file), framework="pt") as handle:  # also checks the dtypes and that the sizes add up
            names = sorted(handle.keys())
        data, header = _read_header(file)
    except (OSError, ValueError, SafetensorError) as error:
        why = _missing_bytes(file) or str(error)
        raise unusable(
            file, f"{file} is not a complete safetensors file", why=why, fix="fetch or write it again"
        ) from error
    found = ((name, header[name]) for name in names)
    return {
        name: TensorEntry(name, of["dtype"], tuple(of["shape"]), file, data + of["data_offsets"][0])
        for name, of in found
    }


def _read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Offset of the data in a safetensors file, and the parsed header; ValueError if it contains a name twice."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError(f"its header would have {length} bytes, and the file has {file.stat().st_size}")
        return 8 + length, json.loads(stream.read(length), object_pairs_hook=unique)


def _missing_bytes(file: Path) -> str:
    """Message with the actual and the expected size of a truncated file; empty if the file is not truncated."""
    try:
        data, header = _read_header(file)
        end = data + max((of["data_offsets"][1] for name, of in header.items() if name != "__metadata__"), default=0)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return ""
    size = file.stat().st_size
    return f"it has {size} of {end} bytes" if size < end else ""


def weight_files(root: Path) -> list[Path]:
    """The weight files of a Hugging Face directory: `model.safetensors`, or the shards listed in its index, sorted.

    Raises:
        BadArtifactError, ConfigurationError: no weights or two sets of them, an unreadable index,
            or a missing shard; see `unusable`.
    """
    single, index = root / SINGLE_NAME, root / INDEX_NAME
    if not single.is_file() and not index.is_file():
        raise weightless(root, (SINGLE_NAME, INDEX_NAME))
    files = [root / name for name in sorted(set(_weight_map(index).values()))] if index.is_file() else [single]
    if single.is_file():
        if others := [file.name for file in files if file != single and file.is_file()]:
            raise unusable(
                root,
                f"{root} holds two sets of weights",
                why=f"{SINGLE_NAME}, which transformers reads, and {others[0]} of {INDEX_NAME}, which vLLM reads",
                fix="remove the files of one set",
            )
        return [single]
    if missing := [file.name for file in files if not file.is_file()]:
        why = f"{len(missing)} of {len(files)} files are missing: {', '.join(missing[:_SHOWN])}"
        raise unusable(root, f"the weights in {root} are not complete", why=why, fix="fetch the model again")
    return files


def weight_entries(root: Path) -> dict[str, TensorEntry]:
    """All tensors of a Hugging Face directory, by name; only headers are read.

    Raises:
        BadArtifactError, ConfigurationError: no weights, an unreadable index, a missing shard, a tensor in two shards,
            an index that disagrees with the shards, or a dtype that the exporters do not support; see `unusable`.
    """
    entries: dict[str, TensorEntry] = {}
    for file in weight_files(root):
        found = header_entries(file)
        if twice := sorted(entries.keys() & found.keys()):
            why = (
                f"{len(twice)} tensor(s) are in two files, the first: {twice[0]}, in {file.name}"
                f" and {entries[twice[0]].file.name}"
            )
            fix = "fetch or write the checkpoint again"
            raise unusable(root, f"the weights in {root} contradict each other", why=why, fix=fix)
        entries |= found
        if unknown := sorted({e.dtype for e in found.values()} - DTYPES.keys()):
            raise unusable(
                file,
                f"{file} holds tensors of dtype {', '.join(unknown)}",
                why=f"supported are {', '.join(DTYPES)}",
                fix="start from an unquantized checkpoint",
            )
    index = root / INDEX_NAME
    weight_map = {} if (root / SINGLE_NAME).is_file() else _weight_map(index)
    wrong = sorted(n for n, f in weight_map.items() if n not in entries or entries[n].file.name != f)
    wrong += sorted(entries.keys() - weight_map.keys()) if weight_map else []
    if wrong:
        raise unusable(
            index,
            f"{index} disagrees with its shards",
            why=f"{len(wrong)} tensor(s), the first: {wrong[0]}",
            fix="fetch or write the checkpoint again",
        )
    return entries


def _weight_map(index: Path) -> dict[str, str]:
    what, fix = f"{index} is not a weight index", "fetch the model again"
    try:
        document = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except ValueError as error:
        why = str(error) if type(error) is ValueError else f"it is not valid JSON: {error}"
        raise unusable(index, what, why=why, fix=fix) from error
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict):
        raise unusable(index, what, why="it has no JSON object weight_map that gives each tensor's file", fix=fix)
    names = {str(k): str(v) for k, v in weight_map.items()}
    outside = [f for f in names.values() if Path(f).name != f]
    if outside:
        why = f"a tensor's file is {outside[0]!r}, which is not the name of a file beside the index"
        raise unusable(index, f"{index} points outside its directory", why=why, fix=fix)
    return names


def read_tensor(entry: TensorEntry) -> Tensor:
    """The tensor, on the CPU; same as `entry.read()`."""
    return entry.read()


def is_scale(name: str, entries: Mapping[str, object]) -> bool:
    """Whether a name is that of another tensor in `entries` plus `SCALE_SUFFIX`."""
    return name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in entries


def shard_names(count: int) -> tuple[str, ...]:
    """Names of `count` weight files: `model.safetensors`, or Hugging Face's numbered shard names."""
    if count == 1:
        return (SINGLE_NAME,)
    return tuple(f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1))


def write_index(root: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Write the index of a sharded checkpoint.

    Args:
        root: the checkpoint's directory.
        weight_map: name of the weight file for each tensor name.
        total_size: size of all tensors together, in bytes.
    """
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (root / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def model_parent(
    root: Path, origin: str, stored: StoredFormat | None = None, known: Mapping[Path, str] | None = None
) -> Parent:
    """Manifest entry for a model directory that is not an artifact of fp8pipe.

    Its digest is the sha256 of the names and sha256 digests of all files that affect the model's answers: weights,
    index, config.json and the files for serving.

    Args:
        root: the model's directory.
        origin: the model's name as the user gave it.
        stored: format of a base model in low precision; the files that declare it are then included in the digest.
        known: sha256 digests of files that were hashed earlier, by path.
    """
    decisive = ("config.json", *SERVED_FILES, *(("hf_quant_config.json",) if stored is not None else ()))
    named = [root / name for name in sidecar_files(root, decisive)]
    index = [root / INDEX_NAME] if (root / INDEX_NAME).is_file() else []
    files = sorted({*weight_files(root), *index, *named})
    digests = {file: (known or {}).get(file) or sha256_file(file) for file in files}
    lines = "".join(f"{digest}  {file.relative_to(root).as_posix()}\n" for file, digest in digests.items())
    digest = hashlib.sha256(lines.encode()).hexdigest()
    return Parent(kind="model", digest=digest, path=origin, content=digest, stored=stored)
