"""Layers of safetensors checkpoints in the layouts that are in use, told apart by their tensors' names and types.

| layout | codes | scales |
|---|---|---|
| compressed-tensors, ModelOpt, this project's | `weight` | `weight_scale` (and `weight_scale_2`, `input_scale`) |
| DeepSeek's FP8 blocks | `weight` | `weight_scale_inv`, which multiplies in spite of its name |
| compressed-tensors, packed | `weight_packed` | `weight_scale`, `weight_global_scale` |
| GPTQ, AWQ | `qweight` | `scales`, with `qzeros` |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from fp8pipe.models.inspection.bytes_of import StoredTensor, chunks, count_ends, decode
from fp8pipe.models.inspection.contents import LayerView

__all__ = ["read_layers"]

_FLOATS: Final = {"F64": "fp64", "F32": "fp32", "F16": "fp16", "BF16": "bf16"}
_CODES: Final = {"F8_E4M3": "fp8-e4m3", "F8_E5M2": "fp8-e5m2", "I8": "int8", "U8": "nvfp4", "F4": "mxfp4"}
# Suffix of the codes, suffixes of what belongs to them; the first of these that is there holds the scales.
_LAYOUTS: Final = (
    (".weight", (".weight_scale", ".weight_scale_inv", ".weight_scale_2", ".weight_tensor_scale", ".input_scale")),
    (".weight_packed", (".weight_scale", ".weight_global_scale", ".weight_shape", ".weight_zero_point")),
    (".qweight", (".scales", ".qzeros", ".g_idx")),
)
_TWO_AXES: Final = 2


def read_layers(tensors: Mapping[str, StoredTensor], bits: int = 4, *, look: bool = True) -> list[LayerView]:
    """One view a weight; tensors that are no matrices are summed up as "other".

    Args:
        tensors: headers of all files.
        bits: width of packed integer codes.
        look: read codes and scales; without it headers alone.
    """
    found: list[LayerView] = []
    used: set[str] = set()
    for name, tensor in tensors.items():
        for suffix, beside in _LAYOUTS:
            if not name.endswith(suffix):
                continue
            stem = name.removesuffix(suffix)
            parts = [tensors[stem + s] for s in beside if stem + s in tensors]
            if suffix == ".weight" and len(tensor.shape) < _TWO_AXES and not parts:
                continue
            used |= {name, *(part.name for part in parts)}
            found.append(_layer(stem, suffix, tensor, parts, bits, look))
    others = [tensor for name, tensor in tensors.items() if name not in used]
    if others:
        size = sum(tensor.size_bytes for tensor in others)
        kinds = ", ".join(sorted({_FLOATS.get(t.dtype, t.dtype.lower()) for t in others}))
        found.append(LayerView(f"{len(others)} other tensors", kinds, None, size))
    return found


def _layer(stem: str, suffix: str, codes: StoredTensor, parts: list[StoredTensor], bits: int, look: bool) -> LayerView:
    size = codes.size_bytes + sum(part.size_bytes for part in parts)
    format = _format(suffix, codes, bits)
    shape = _shape(suffix, codes, parts[0] if parts else None, format, bits)
    if not parts or format in _FLOATS.values():
        return LayerView(stem, format, shape, size)
    scales = parts[0]
    view = LayerView(stem, format, shape, size, _granularity(scales.shape[:: -1 if suffix == ".qweight" else 1], shape))
    if look:
        for part in chunks(scales):
            view.scales.add(decode(part, scales.dtype))
        kind = "int4" if format in ("int4-packed", "int4-gptq") else format
        for part in chunks(codes):
            counted = count_ends(part, kind)
            view.codes, view.saturated, view.nan = (
                a + b for a, b in zip((view.codes, view.saturated, view.nan), counted, strict=True)
            )
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
    """(out, in), undoing the packing."""
    if suffix == ".qweight":  # inputs first; GPTQ packs along them, AWQ along the outputs
        outputs = scales.shape[-1] if scales is not None else codes.shape[1]
        packed = codes.shape[1] != outputs
        return outputs, codes.shape[0] if packed else codes.shape[0] * 32 // bits
    if format in ("nvfp4", "mxfp4") and codes.dtype == "U8":
        return (*codes.shape[:-1], codes.shape[-1] * 2)
    if suffix == ".weight_packed":
        return codes.shape[0], codes.shape[1] * 32 // bits
    return codes.shape


def _granularity(scales: tuple[int, ...], shape: tuple[int, ...] | None) -> str:
    count = math.prod(scales)
    if count == 1:
        return "per-tensor"
    if shape is not None and count == shape[0]:
        return "per-channel"
    if shape is not None and len(scales) == _TWO_AXES and len(shape) == _TWO_AXES:
        blocks = tuple(-(-whole // part) for whole, part in zip(shape, scales, strict=True))
        return f"blocks of {blocks[0]}x{blocks[1]}"
    return "per-block"
