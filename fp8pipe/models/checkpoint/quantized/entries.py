"""Presents an FP8 checkpoint as floating-point tensors: codes and scales form one entry, decoded when it is read.

Every shape is checked in advance: a scale for a different block size may still broadcast, but gives a different model.
Tensors that quantize activations or the key/value cache are not weights; they are skipped, and their names are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import Tensor

from fp8pipe.models.checkpoint.quantized.scheme import Granularity, Scheme, refusal
from fp8pipe.models.checkpoint.quantized.values import block_grid, dequantize_codes
from fp8pipe.models.checkpoint.tensors import DTYPES, PLAIN_FLOATS, TensorEntry, read_tensor, stored_rows

__all__ = ["DequantizedEntry", "Plain", "dequantized", "refuse_codes", "refuse_leftover_codes"]

# Name suffixes of tensors that quantize activations and the key/value cache at run time.
_RUNTIME: Final = (
    ".input_scale", ".output_scale", ".activation_scale", ".k_scale", ".v_scale", ".q_scale", ".kv_scale",
    ".prob_output_scale", ".input_zero_point", ".output_zero_point",
)  # fmt: skip
_ZERO_POINT: Final = ".weight_zero_point"
_BUFFERS: Final = frozenset({"bias", "masked_bias", "position_ids", "token_type_ids", "mask"})
_INTEGERS: Final = frozenset({"I8", "U8", "I16", "U16", "I32", "U32"})
_SCALES: Final = PLAIN_FLOATS | {"F8_E8M0"}  # E8M0 scales are powers of two
_SHOWN: Final = 3


@dataclass(frozen=True, slots=True)
class DequantizedEntry(TensorEntry):
    """An FP8 weight; `dtype` and `shape` are those of the floating-point tensor that `read` returns.

    Attributes:
        scale: the entry of its scales.
        block: rows and columns that share a scale; None for per-tensor or per-row scales.
    """

    scale: TensorEntry
    block: tuple[int, int] | None

    def read(self) -> Tensor:
        """The dequantized weight, a new tensor on the CPU; see `dequantize_codes`."""
        return dequantize_codes(TensorEntry.read(self), self.scale.read(), self.block, DTYPES[self.dtype])

    def read_rows(self, rows: range) -> Tensor:
        """Consecutive rows of the dequantized weight; for a matrix, only the codes of the affected blocks are read."""
        if len(self.shape) != 2:
            return self.read()[rows.start : rows.stop]
        height = 1 if self.block is None else self.block[0]
        first = rows.start // height
        codes = stored_rows(self, "F8_E4M3", range(first * height, rows.stop))
        scale = self.scale.read()
        if scale.numel() > 1:
            blocks = -(-self.shape[0] // height)
            scale = scale.reshape(blocks, -1)[first : -(-rows.stop // height)]
        return dequantize_codes(codes, scale, self.block, DTYPES[self.dtype])[rows.start - first * height :]


@dataclass(frozen=True, slots=True)
class Plain:
    """A checkpoint decoded to floating point.

    Attributes:
        entries: floating-point tensors by name.
        granularities: the scale granularity (per tensor, per row, per block) by weight.
        runtime: names of the skipped run-time tensors.
    """

    entries: dict[str, TensorEntry]
    granularities: Mapping[str, Granularity]
    runtime: tuple[str, ...]


def refuse_codes(root: Path, entries: Mapping[str, TensorEntry]) -> None:
    """Refuse a checkpoint that contains quantized tensors but declares no format.

    Raises:
        ConfigurationError: names the first such tensor.
    """
    if (found := next(filter(_is_quantized, entries.values()), None)) is not None:
        raise refusal(root, f"{found.file.name}: {found.name} has dtype {found.dtype}, config.json declares no format")


def dequantized(root: Path, entries: Mapping[str, TensorEntry], scheme: Scheme, dtype: str) -> Plain:
    """The contents of a checkpoint in a declared format, as floating-point tensors.

    Args:
        root: the checkpoint's directory, for messages.
        entries: all its tensors.
        scheme: the declared format.
        dtype: target dtype of the weights, in safetensors' spelling.

    Raises:
        ConfigurationError: codes of another type, without a scale or with one of the wrong shape; scales without codes;
            zero points; no FP8 tensor at all.
    """
    codes = {name: entry for name, entry in entries.items() if entry.dtype == "F8_E4M3"}
    if not codes:
        raise refusal(root, f"config.json declares {scheme.method}, and no tensor is in FP8")
    scales = {name: _scale(name, entries, scheme) for name in codes}
    if missing := [name for name, scale in scales.items() if scale is None]:
        ends = " or ".join(name + suffix for name in missing[:1] for suffix in scheme.suffixes)
        raise refusal(root, f"{len(missing)} of {len(codes)} FP8 weights have no scale: {_some(missing)} (no {ends})")
    used = {scale.name for scale in scales.values() if scale is not None}
    runtime = tuple(name for name in entries if name.endswith(_RUNTIME) and name not in used)
    table: dict[str, TensorEntry] = {}
    granularities: dict[str, Granularity] = {}
    for name, entry in entries.items():
        scale = scales.get(name)
        if scale is not None:
            granularities[name], block = _layout(root, entry, scale, scheme)
            table[name] = DequantizedEntry(name, dtype, entry.shape, entry.file, entry.start, scale, block)
        elif name.endswith(_ZERO_POINT):
            _refuse_offset(root, entry)
        elif name not in used and name not in runtime:
            table[name] = entry
    _refuse_leftovers(root, table, scheme)
    return Plain(table, granularities, runtime)


def _scale(name: str, entries: Mapping[str, TensorEntry], scheme: Scheme) -> TensorEntry | None:
    found = [entries[name + suffix] for suffix in scheme.suffixes if name + suffix in entries]
    return found[0] if found else None


def _layout(
    root: Path, codes: TensorEntry, scale: TensorEntry, scheme: Scheme
) -> tuple[Granularity, tuple[int, int] | None]:
    """Scale granularity and block, from the shape of the scales; an undeclared granularity is refused."""
    if scale.dtype not in _SCALES or len(codes.shape) < 2:
        raise refusal(root, f"{scale.name} is {scale.dtype}, of a weight {codes.shape}: scales are floats, of matrices")
    wanted: list[str] = []
    if "per-tensor" in scheme.granularities:
        if math.prod(scale.shape) == 1:
            return "per-tensor", None
        wanted.append("() per tensor")
    if "per-channel" in scheme.granularities:
        if scale.shape in {codes.shape[:-1], (*codes.shape[:-1], 1)}:
            return "per-channel", None
        wanted.append(f"{(*codes.shape[:-1], 1)} per row")
    if scheme.block is not None:
        grid = block_grid(codes.shape, scheme.block)
        if scale.shape in {grid, (grid[-2], 1, grid[-1], 1)} or (math.prod(grid) == 1 == math.prod(scale.shape)):
            return "per-block", scheme.block
        wanted.append(f"{grid} per block of {scheme.block[0]}x{scheme.block[1]}")
    why = f"{scale.name} has shape {scale.shape}, its weight {codes.shape}; expected {' or '.join(wanted)}"
    raise refusal(root, why)


def _refuse_offset(root: Path, entry: TensorEntry) -> None:
    if bool((read_tensor(entry).float() != 0).any()):
        raise refusal(root, f"{entry.name} is not zero: its weight is (code - zero point) * scale")


def _refuse_leftovers(root: Path, table: Mapping[str, TensorEntry], scheme: Scheme) -> None:
    alone = [name for name in table for suffix in scheme.suffixes if name.endswith(f".weight{suffix}")]
    if alone:
        raise refusal(root, f"{len(alone)} scale(s) belong to no weight in FP8: {_some(alone)}")
    others = (entry for entry in table.values() if not isinstance(entry, DequantizedEntry))
    refuse_leftover_codes(root, others, scheme.method)


def refuse_leftover_codes(root: Path, entries: Iterable[TensorEntry], method: str) -> None:
    """Refuse tensors that hold codes and were not read as the declared method's.

    Raises:
        ConfigurationError: names the first.
    """
    if (found := next(filter(_is_quantized, entries), None)) is not None:
        raise refusal(root, f"{found.file.name}: {found.name} has dtype {found.dtype}, not read as {method}")


def _is_quantized(entry: TensorEntry) -> bool:
    """Whether a tensor holds codes: FP8 and FP4 always, integers only if shaped and named like weights."""
    if entry.dtype.startswith(("F8", "F4", "F6")):
        return True
    return entry.dtype in _INTEGERS and len(entry.shape) >= 2 and entry.name.rpartition(".")[2] not in _BUFFERS


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
