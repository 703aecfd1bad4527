"""A checkpoint in FP8 as a table of floats: codes and their scales become one entry, which is decoded when it is read.

Every shape is checked before: a scale that belongs to another size of block still multiplies, and the model is another
one. What belongs to activations and to the key/value cache is no weight, and is left behind by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import Tensor

from fp8pipe.models.checkpoint.quantized.scheme import Granularity, Scheme, refusal
from fp8pipe.models.checkpoint.quantized.values import block_grid, dequantize_codes
from fp8pipe.models.checkpoint.tensors import DTYPES, PLAIN_FLOATS, TensorEntry, read_tensor, stored_rows

__all__ = ["DequantizedEntry", "Plain", "dequantized", "refuse_codes"]

# Ends of names of what quantizes activations and the key/value cache while the model runs.
_RUNTIME: Final = (
    ".input_scale", ".output_scale", ".activation_scale", ".k_scale", ".v_scale", ".q_scale", ".kv_scale",
    ".prob_output_scale", ".input_zero_point", ".output_zero_point",
)  # fmt: skip
_ZERO_POINT: Final = ".weight_zero_point"
_BUFFERS: Final = frozenset({"bias", "masked_bias", "position_ids", "token_type_ids", "mask"})
_INTEGERS: Final = frozenset({"I8", "U8", "I16", "U16", "I32", "U32"})
_SCALES: Final = PLAIN_FLOATS | {"F8_E8M0"}  # the last are powers of two
_SHOWN: Final = 3


@dataclass(frozen=True, slots=True)
class DequantizedEntry(TensorEntry):
    """A weight in FP8; `dtype` and `shape` are those of the floats that `read` gives.

    Attributes:
        scale: its scales.
        block: rows and columns that share one, None for one per tensor or per row.
    """

    scale: TensorEntry
    block: tuple[int, int] | None

    def read(self) -> Tensor:
        """The weight as floats, a new tensor on the CPU; see `dequantize_codes`."""
        return dequantize_codes(TensorEntry.read(self), self.scale.read(), self.block, DTYPES[self.dtype])

    def read_rows(self, rows: range) -> Tensor:
        """Consecutive rows of the weight as floats; of a matrix only the codes of their blocks are read."""
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
    """The table.

    Attributes:
        entries: of floats, by name.
        granularities: what shares a scale in it, by weight.
        runtime: names of what was left behind.
    """

    entries: dict[str, TensorEntry]
    granularities: Mapping[str, Granularity]
    runtime: tuple[str, ...]


def refuse_codes(root: Path, entries: Mapping[str, TensorEntry]) -> None:
    """Refuse a checkpoint that declares no format and holds quantized tensors all the same.

    Raises:
        ConfigurationError: naming the first.
    """
    if (found := next(filter(_is_quantized, entries.values()), None)) is not None:
        raise refusal(root, f"{found.file.name}: {found.name} has dtype {found.dtype}, config.json declares no format")


def dequantized(root: Path, entries: Mapping[str, TensorEntry], scheme: Scheme, dtype: str) -> Plain:
    """What a checkpoint in a declared format holds, as floats.

    Args:
        root: its directory, for messages.
        entries: all its tensors.
        scheme: the format.
        dtype: that weights are rounded to, as safetensors spells it.

    Raises:
        ConfigurationError: codes of another grid, without a scale or with one of another shape; scales without codes;
            zero points; nothing in FP8.
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
    """What shares a scale, from the shape of the scales; one that is not declared is refused."""
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
    if (found := next(filter(_is_quantized, others), None)) is not None:
        raise refusal(root, f"{found.file.name}: {found.name} has dtype {found.dtype}, not read as {scheme.method}")


def _is_quantized(entry: TensorEntry) -> bool:
    """FP8 and FP4 anywhere; integers only where a weight can be: some checkpoints keep integer masks."""
    if entry.dtype.startswith(("F8", "F4", "F6")):
        return True
    return entry.dtype in _INTEGERS and len(entry.shape) >= 2 and entry.name.rpartition(".")[2] not in _BUFFERS


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
