"""Safetensors files as headers and raw bytes, in chunks; numbers of every type decoded by hand.

Torch and numpy lack some of these types, and a library that maps whole files needs the address space for them.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fp8pipe.core.errors import BadArtifactError

__all__ = ["StoredTensor", "chunks", "count_ends", "decode", "read_headers"]

_CHUNK_BYTES = 8 << 20
_LARGEST_HEADER = 100 << 20


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file, from its header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size_bytes: int


def read_headers(file: Path) -> dict[str, StoredTensor]:
    """Tensors of a safetensors file; nothing but the header is read.

    Raises:
        BadArtifactError: it is none, or shorter than its header says.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, _LARGEST_HEADER):
                raise ValueError(f"its header would have {length} bytes")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        found = {
            name: StoredTensor(
                name, entry["dtype"], tuple(entry["shape"]), file, 8 + length + entry["data_offsets"][0],
                entry["data_offsets"][1] - entry["data_offsets"][0],
            )
            for name, entry in header.items()
        }  # fmt: skip
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadArtifactError(f"{file} cannot be read as safetensors", why=str(error)[:300]) from error
    end = max((t.start + t.size_bytes for t in found.values()), default=0)
    if end > size:
        raise BadArtifactError(f"{file} is cut short", why=f"its header promises {end} bytes, it has {size}")
    return found


def chunks(tensor: StoredTensor) -> Iterator[np.ndarray]:
    """The tensor's bytes, some megabytes at a time: uint8, one axis."""
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        left = tensor.size_bytes
        while left and (data := stream.read(min(left, _CHUNK_BYTES))):
            left -= len(data)
            yield np.frombuffer(data, np.uint8)


def decode(data: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers of some bytes, float64, one axis; `dtype` as safetensors spells it.

    Raises:
        ValueError: a type that holds no scales.
    """
    if dtype == "BF16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype == "F8_E4M3":
        return _E4M3[data]
    if dtype == "F8_E8M0":
        return np.exp2(data.astype(np.float64) - 127)
    if dtype in _PLAIN:
        return data.view(_PLAIN[dtype]).astype(np.float64)
    raise ValueError(f"scales of {dtype}")


_PLAIN = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}


def _e4m3_values() -> np.ndarray:
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * np.exp2(exponent - 10.0))
    size[(codes & 0x7F) == 0x7F] = np.nan
    return np.where(codes & 0x80, -size, size)


_E4M3 = _e4m3_values()


def count_ends(data: np.ndarray, format: str) -> tuple[int, int, int]:
    """Codes, codes at an end of their grid, and NaN among some bytes.

    Args:
        data: uint8, one axis.
        format: of the codes; four-bit codes lie two in a byte.
    """
    if format == "fp8-e4m3":
        magnitude = data & 0x7F
        return data.size, int((magnitude == 0x7E).sum()), int((magnitude == 0x7F).sum())
    if format == "fp8-e5m2":
        magnitude = data & 0x7F
        return data.size, int((magnitude == 0x7B).sum()), int((magnitude > 0x7C).sum())
    if format == "int8":
        values = data.view(np.int8)
        return data.size, int(((values == 127) | (values <= -127)).sum()), 0
    if format in ("nvfp4", "mxfp4"):
        return 2 * data.size, sum(int(((data >> shift) & 7 == 7).sum()) for shift in (0, 4)), 0
    if format == "int4":
        nibbles = [(data >> shift) & 15 for shift in (0, 4)]
        return 2 * data.size, sum(int(((part == 0) | (part == 15)).sum()) for part in nibbles), 0
    return 0, 0, 0
