"""Reads an FP8 checkpoint as floating-point tensors: a weight's codes and scales become one entry, decoded on reading.

All shapes are checked when the checkpoint is opened: scales for another block size might still broadcast, and would
give a wrong model. Tensors that quantize activations or the key/value cache are not weights; they are skipped, and
their names are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import Tensor

from fp8pipe.models.checkpoint.quantized.scheme import Granularity, Scheme, refusal
from fp8pipe.models.checkpoint.quantized.values import dequantize_codes
from fp8pipe.models.checkpoint.tensors import DTYPES, PLAIN_FLOATS, TensorEntry, read_tensor, stored_rows
from fp8pipe.numerics.blocks import block_grid

__all__ = ["RUNTIME", "DequantizedEntry", "Plain", "dequantized", "refuse_codes", "refuse_leftover_codes"]

# Name suffixes of tensors that quantize activations and the key/value cache at run time.
RUNTIME: Final = (
    ".input_scale", ".output_scale", ".activation_scale", ".k_scale", ".v_scale", ".q_scale", ".kv_scale",
    ".prob_output_scale", ".input_zero_point", ".output_zero_point", ".input_global_scale",
)  # fmt: skip
_ZERO_POINT: Final = ".weight_zero_point"
_BUFFERS: Final = frozenset({"bias", "masked_bias", "position_ids", "token_type_ids", "mask"})
_PARAMETERS: Final = frozenset({"weight", "bias"})
_INTEGERS: Final = frozenset({"I8", "U8", "I16", "U16", "I32", "U32"})
_SCALES: Final = PLAIN_FLOATS | {"F8_E8M0"}  # E8M0 scales are powers of two
_SHOWN: Final = 3


@dataclass(frozen=True, slots=True)
class DequantizedEntry(TensorEntry):
    """An FP8 weight. `dtype` and `shape` describe the floating-point tensor that `read` returns.

    Attributes:
        scale: the entry of the weight's scales.
        block: (rows, columns) of the blocks that share a scale; None for per-tensor or per-row scales.
    """

    scale: TensorEntry
    block: tuple[int, int] | None

    def read(self) -> Tensor:
        """The dequantized weight, a new tensor on the CPU; see `dequantize_codes`.

        Raises:
            ConfigurationError: a scale is zero or negative.
        """
        return dequantize_codes(TensorEntry.read(self), self._scale(), self.block, DTYPES[self.dtype])

    def read_rows(self, rows: range) -> Tensor:
        """Consecutive rows of the dequantized weight; of a matrix, only the codes of the blocks concerned are read."""
        if len(self.shape) != 2:
            return self.read()[rows.start : rows.stop]
        height = 1 if self.block is None else self.block[0]
        first = rows.start // height
        codes = stored_rows(self, "F8_E4M3", range(first * height, rows.stop))
        scale = self._scale()
        if scale.numel() > 1:
            blocks = -(-self.shape[0] // height)
            scale = scale.reshape(blocks, -1)[first : -(-rows.stop // height)]
        return dequantize_codes(codes, scale, self.block, DTYPES[self.dtype])[rows.start - first * height :]

    def _scale(self) -> Tensor:
        scale = self.scale.read()
        wrong = scale.float() <= 0  # NaN and infinity show in the weight, and are refused there
        if bool(wrong.any()):
            why = f"{int(wrong.sum())} of {scale.numel()} scales of {self.scale.name} are zero or negative"
            raise refusal(
                self.file.parent, f"{self.file.name}: {why}; a weight is code * scale, and scales are positive"
            )
        return scale


@dataclass(frozen=True, slots=True)
class Plain:
    """A checkpoint decoded to floating point.

    Attributes:
        entries: floating-point tensors by name.
        granularities: granularity of the scales, by the name of each FP8 weight.
        runtime: names of the skipped tensors, which quantize activations or the key/value cache.
    """

    entries: dict[str, TensorEntry]
    granularities: Mapping[str, Granularity]
    runtime: tuple[str, ...]


def refuse_codes(root: Path, entries: Mapping[str, TensorEntry]) -> None:
    """Reject a checkpoint that contains quantized tensors although it declares no quantization format.

    Raises:
        ConfigurationError: names the first such tensor.
    """
    if (found := next(filter(_is_quantized, entries.values()), None)) is not None:
        raise refusal(root, f"{found.file.name}: {found.name} has dtype {found.dtype}, config.json declares no format")


def dequantized(root: Path, entries: Mapping[str, TensorEntry], scheme: Scheme, dtype: str) -> Plain:
    """Combine the codes and scales of an FP8 checkpoint into floating-point entries; no codes are read.

    Args:
        root: the checkpoint's directory, for error messages.
        entries: all tensors of the checkpoint, as stored.
        scheme: the declared format.
        dtype: dtype of the dequantized weights, in safetensors' spelling.

    Raises:
        ConfigurationError: a weight has codes that are not E4M3, no scale, a scale of the wrong shape, or a zero point
            other than 0; a scale belongs to no FP8 weight; or the checkpoint has no FP8 tensor at all.
    """
    offsets = {name for name in entries if name.endswith(_ZERO_POINT)}  # early checkpoints hold them in FP8, too
    codes = {name: entry for name, entry in entries.items() if entry.dtype == "F8_E4M3" and name not in offsets}
    if not codes:
        raise refusal(root, f"config.json declares {scheme.method}, but no tensor is in FP8")
    scales = {name: _scale(name, entries, scheme) for name in codes}
    if missing := [name for name, scale in scales.items() if scale is None]:
        ends = " or ".join(name + suffix for name in missing[:1] for suffix in scheme.suffixes)
        raise refusal(root, f"{len(missing)} of {len(codes)} FP8 weights have no scale: {_some(missing)} (no {ends})")
    used = {scale.name for scale in scales.values() if scale is not None}
    runtime = tuple(name for name in entries if name.endswith(RUNTIME) and name not in used)
    table: dict[str, TensorEntry] = {}
    granularities: dict[str, Granularity] = {}
    for name, entry in entries.items():
        scale = scales.get(name)
        if scale is not None:
            granularities[name], block = _layout(root, entry, scale, scheme)
            table[name] = DequantizedEntry(name, dtype, entry.shape, entry.file, entry.start, scale, block)
        elif name in offsets:
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
    """Granularity and block of a weight's scales, derived from their shape and checked against the declared format."""
    if scale.dtype not in _SCALES or len(codes.shape) < 2:
        raise refusal(
            root, f"{scale.name} is {scale.dtype} for a weight {codes.shape}; only float scales of matrices are read"
        )
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
        raise refusal(root, f"{entry.name} is not zero; only symmetric weights, code * scale, are read")


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
    """Whether a tensor holds codes: every FP8, FP6 or FP4 tensor, and integers in place of weights, biases and norms.

    Integer matrices are not codes if they are named like buffers, such as the causal mask in old GPT-2s.
    """
    if entry.dtype in PLAIN_FLOATS:
        return False  # F64 begins like FP6
    if entry.dtype.startswith(("F8", "F4", "F6")):
        return True
    leaf = entry.name.rpartition(".")[2]
    named = leaf not in _BUFFERS if len(entry.shape) >= 2 else leaf in _PARAMETERS and len(entry.shape) == 1
    return entry.dtype in _INTEGERS and named


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
