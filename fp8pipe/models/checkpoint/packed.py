"""Weights in NVFP4 as compressed-tensors stores them: three tensors, which are handled as one that decodes itself.

`LAYER.weight_packed` holds two E2M1 codes in a byte, `LAYER.weight_scale` an E4M3 scale for every 16 inputs of a row,
and `LAYER.weight_global_scale` a divisor: a weight is `code * scale / divisor`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from fp8pipe.models.checkpoint.tensors import TensorEntry, TensorHeader
from fp8pipe.numerics.nvfp4 import BLOCK
from fp8pipe.numerics.nvfp4_weights import dequantize_packed

__all__ = [
    "DIVISOR_SUFFIX", "INPUT_SUFFIX", "PACKED_SUFFIX", "WEIGHT", "PackedEntry", "is_input_scale", "join_packed",
    "packed_headers",
]  # fmt: skip

WEIGHT: Final = ".weight"
PACKED_SUFFIX: Final = "_packed"  # after the name of the weight
BLOCKS_SUFFIX: Final = "_scale"
DIVISOR_SUFFIX: Final = "_global_scale"
INPUT_SUFFIX: Final = ".input_global_scale"  # after the name of the layer: a divisor, too


@dataclass(frozen=True, slots=True)
class PackedEntry(TensorEntry):
    """A weight in NVFP4; `name`, `dtype` (F32) and `shape`, `(out, in)`, are those of the tensor that `read` returns.

    Attributes:
        packed: the entry of its codes, uint8 `(out, in / 2)`.
        blocks: the entry of its block scales, E4M3 `(out, in / 16)`.
        divisor: the entry of the reciprocal of its global scale, fp32 `(1,)`.
    """

    packed: TensorEntry
    blocks: TensorEntry
    divisor: TensorEntry

    @property
    def parts(self) -> tuple[TensorEntry, TensorEntry, TensorEntry]:
        """The stored tensors."""
        return self.packed, self.blocks, self.divisor

    def read(self) -> Tensor:
        """The dequantized weight, a new fp32 tensor on the CPU."""
        return self.read_rows(range(self.shape[0]))

    def read_rows(self, rows: range) -> Tensor:
        """Consecutive rows of the dequantized weight, fp32; NaN where a scale is NaN."""
        scale = float(self.divisor.read().reshape(-1)[0].double().reciprocal())
        return dequantize_packed(self.packed.read_rows(rows), self.blocks.read_rows(rows), scale)


def packed_headers(name: str, shape: tuple[int, ...]) -> tuple[TensorHeader, TensorHeader, TensorHeader]:
    """The tensors that store a weight `(out, in)` called `name`: codes, block scales and divisor."""
    rows, columns = shape
    return (
        TensorHeader(name + PACKED_SUFFIX, "U8", (rows, columns // 2)),
        TensorHeader(name + BLOCKS_SUFFIX, "F8_E4M3", (rows, columns // BLOCK)),
        TensorHeader(name + DIVISOR_SUFFIX, "F32", (1,)),
    )


def is_input_scale(name: str) -> bool:
    """Whether a tensor is the divisor of a layer's inputs in NVFP4."""
    return name.endswith(INPUT_SUFFIX)


def join_packed(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Replace the tensors of each weight in NVFP4 by one entry; those that lack a part or do not fit stay as they are.

    Args:
        entries: the tensors of a checkpoint by name.
    """
    table = dict(entries)
    for name, packed in entries.items():
        weight = name.removesuffix(PACKED_SUFFIX)
        if weight == name or not weight.endswith(WEIGHT) or len(packed.shape) != 2:
            continue
        shape = (packed.shape[0], 2 * packed.shape[1])
        wanted = packed_headers(weight, shape)
        found = [entries.get(header.name) for header in wanted]
        if all(
            entry is not None and (entry.dtype, entry.shape) == (header.dtype, header.shape)
            for entry, header in zip(found, wanted, strict=True)
        ):
            parts = [table.pop(header.name) for header in wanted]
            table[weight] = PackedEntry(weight, "F32", shape, packed.file, packed.start, *parts)
    return table
