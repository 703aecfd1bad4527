"""Inspects the layers in safetensors files in the common quantization layouts, from headers and chunks of raw bytes.

All dtypes are decoded by this module, because torch and numpy lack some of them, and because a library that maps whole
files needs enough address space. A layout is recognized by the names and dtypes of its tensors:

| layout | codes | scales |
|---|---|---|
| compressed-tensors, ModelOpt, fp8pipe | `weight` | `weight_scale` (and `weight_scale_2`, `input_scale`) |
| DeepSeek's FP8 blocks | `weight` | `weight_scale_inv`; despite its name, codes are multiplied by it |
| compressed-tensors, packed | `weight_packed` | `weight_scale`, `weight_global_scale`, `input_global_scale` |
| GPTQ, AWQ | `qweight` | `scales`, with `qzeros` |
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from fp8pipe.models.checkpoint.blame import unusable
from fp8pipe.models.inspection.contents import LayerView

_CHUNK_BYTES: Final = 8 << 20
_LARGEST_HEADER: Final = 100 << 20
_NUMPY_TYPES: Final = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
_FIX: Final = "fetch or write it again"
# Bit patterns without sign of the largest finite code, and of the last code that is not NaN (infinity in E5M2).
_FP8_ENDS: Final = {"fp8-e4m3": (0x7E, 0x7E), "fp8-e5m2": (0x7B, 0x7C)}
_FLOATS: Final = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}
_CODES: Final = {"F8_E4M3": "fp8-e4m3", "F8_E5M2": "fp8-e5m2", "I8": "int8", "U8": "nvfp4", "F4": "mxfp4"}
# For each layout: name suffix of the codes, and of the tensors that belong to them. The first of these that exists
# contains the scales.
_LAYOUTS: Final = (
    (".weight", (".weight_scale", ".weight_scale_inv", ".weight_scale_2", ".weight_tensor_scale", ".input_scale")),
    (
        ".weight_packed",
        (".weight_scale", ".weight_global_scale", ".weight_shape", ".weight_zero_point", ".input_global_scale"),
    ),
    (".qweight", (".scales", ".qzeros", ".g_idx")),
)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor as described in a file's header; `start` is the offset of its data in the file, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size_bytes: int


def read_headers(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file; only the header is read.

    Raises:
        BadArtifactError, ConfigurationError: not a safetensors file, or truncated; see `unusable`.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size, _LARGEST_HEADER):
                raise ValueError(f"its header would have {length} bytes, and the file has {size}")
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
        raise unusable(file, f"{file} cannot be read as safetensors", why=str(error)[:300], fix=_FIX) from error
    end = max((t.start + t.size_bytes for t in found.values()), default=0)
    if end > size:
        raise unusable(file, f"{file} is cut short", why=f"its header promises {end} bytes, it has {size}", fix=_FIX)
    return found


def chunks(tensor: StoredTensor) -> Iterator[np.ndarray]:
    """Yield the tensor's raw bytes in chunks of at most 8 MiB, as one-dimensional uint8 arrays."""
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        left = tensor.size_bytes
        while left and (data := stream.read(min(left, _CHUNK_BYTES))):
            left -= len(data)
            yield np.frombuffer(data, np.uint8)


def decode(data: np.ndarray, dtype: str) -> np.ndarray:
    """Decode the raw bytes of scales.

    Args:
        data: the bytes, uint8, one-dimensional.
        dtype: dtype of the scales, in safetensors' spelling.

    Returns:
        The values as a one-dimensional float64 array.

    Raises:
        ValueError: a dtype that is not used for scales.
    """
    if dtype == "BF16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype == "F8_E4M3":
        exponent, mantissa = (data >> 3) & 15, data & 7
        values: np.ndarray = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * np.exp2(exponent - 10.0))
        values[(data & 0x7F) == 0x7F] = np.nan
        return np.where(data & 0x80, -values, values)
    if dtype == "F8_E8M0":
        powers: np.ndarray = np.exp2(data.astype(np.float64) - 127)
        return powers
    if dtype in _NUMPY_TYPES:
        return data.view(_NUMPY_TYPES[dtype]).astype(np.float64)
    raise ValueError(f"scales of {dtype}")


def count_ends(data: np.ndarray, format: str) -> tuple[int, int, int]:
    """Count the codes in raw bytes.

    Args:
        data: the bytes, uint8, one-dimensional. 4-bit codes are packed two per byte.
        format: format of the codes, such as "fp8-e4m3" or "int4".

    Returns:
        Number of codes, of saturated codes and of NaN codes; zeros for an unknown format.
    """
    if format in _FP8_ENDS:
        magnitude, (largest, last) = data & 0x7F, _FP8_ENDS[format]
        return data.size, int((magnitude == largest).sum()), int((magnitude > last).sum())
    if format == "int8":
        values = data.view(np.int8)
        return data.size, int(((values == 127) | (values <= -127)).sum()), 0
    if format in ("nvfp4", "mxfp4"):
        return 2 * data.size, sum(int(((data >> shift) & 7 == 7).sum()) for shift in (0, 4)), 0
    if format == "int4":
        nibbles = [(data >> shift) & 15 for shift in (0, 4)]
        return 2 * data.size, sum(int(((part == 0) | (part == 15)).sum()) for part in nibbles), 0
    return 0, 0, 0


def read_layers(
    tensors: Mapping[str, StoredTensor], bits: int = 4, *, block: tuple[int, int] | None = None, look: bool = True
) -> list[LayerView]:
    """Inspect all weights in the given tensors.

    Args:
        tensors: the tensors of a checkpoint by name.
        bits: width of packed integer codes.
        block: rows and columns of the declared blocks with one scale each; None if none are declared.
        look: also read codes and scales; otherwise only the headers are used.

    Returns:
        One view per weight. Tensors that belong to no weight matrix are summarized in a last view.
    """
    found: list[LayerView] = []
    used: set[str] = set()
    for name, tensor in tensors.items():
        for suffix, beside in _LAYOUTS:
            if not name.endswith(suffix):
                continue
            stem = name.removesuffix(suffix)
            parts = [tensors[stem + s] for s in beside if stem + s in tensors]
            if suffix == ".weight" and len(tensor.shape) < 2 and not parts:
                continue
            used |= {name, *(part.name for part in parts)}
            found.append(_layer(stem, suffix, tensor, parts, bits, block, look))
    others = [tensor for name, tensor in tensors.items() if name not in used]
    if others:
        size = sum(tensor.size_bytes for tensor in others)
        kinds = ", ".join(sorted({_FLOATS.get(t.dtype, t.dtype.lower()) for t in others}))
        found.append(LayerView(f"{len(others)} other tensors", kinds, None, size))
    return found


def _layer(
    stem: str, suffix: str, codes: StoredTensor, parts: list[StoredTensor], bits: int, block: tuple[int, int] | None,
    look: bool,
) -> LayerView:  # fmt: skip
    size = codes.size_bytes + sum(part.size_bytes for part in parts)
    format = _format(suffix, codes, bits)
    shape = _shape(suffix, codes, parts[0] if parts else None, format, bits)
    if not parts or format in _FLOATS.values():
        return LayerView(stem, format, shape, size)
    scales = parts[0]
    granularity = _granularity(scales.shape[:: -1 if suffix == ".qweight" else 1], shape, block)
    view = LayerView(stem, format, shape, size, granularity)
    if look:
        for part in chunks(scales):
            view.scales.add(decode(part, scales.dtype))
        kind = "int4" if format in ("int4-packed", "int4-gptq") else format
        for part in chunks(codes):
            view.add_codes(*count_ends(part, kind))
    return view


def _format(suffix: str, codes: StoredTensor, bits: int) -> str:
    if suffix == ".qweight":
        return f"int{bits}-gptq"
    if suffix == ".weight_packed":
        return "nvfp4" if codes.dtype == "U8" else f"int{bits}-packed"
    return _FLOATS.get(codes.dtype) or _CODES.get(codes.dtype) or codes.dtype.lower()


def _shape(
    suffix: str, codes: StoredTensor, scales: StoredTensor | None, format: str, bits: int
) -> tuple[int, ...] | None:
    """Shape of the unpacked weight, (out, in)."""
    if suffix == ".qweight":  # stored (in, out); GPTQ packs along the inputs, AWQ along the outputs
        outputs = scales.shape[-1] if scales is not None else codes.shape[1]
        packed = codes.shape[1] != outputs
        return outputs, codes.shape[0] if packed else codes.shape[0] * 32 // bits
    if format in ("nvfp4", "mxfp4") and codes.dtype == "U8":
        return (*codes.shape[:-1], codes.shape[-1] * 2)
    if suffix == ".weight_packed":
        return codes.shape[0], codes.shape[1] * 32 // bits
    return codes.shape


def _granularity(scales: tuple[int, ...], shape: tuple[int, ...] | None, block: tuple[int, int] | None) -> str:
    count = math.prod(scales)
    if count == 1:
        return "per-tensor"
    if shape is not None and (count == shape[0] or scales == (1, shape[-1])):  # the second: of weights (in, out)
        return "per-channel"
    if shape is not None and len(scales) == 2 and len(shape) == 2:
        if block is not None and scales == tuple(-(-whole // side) for whole, side in zip(shape, block, strict=True)):
            return f"blocks of {block[0]}x{block[1]}"
        if all(whole % part == 0 for whole, part in zip(shape, scales, strict=True)):
            return f"blocks of {shape[0] // scales[0]}x{shape[1] // scales[1]}"
    return "per-block"
