"""Weights in NVFP4 as checkpoints store them: three tensors, which are handled as one that decodes itself.

They are two E2M1 codes in a byte, an E4M3 scale for every 16 inputs of a row, and one number for the whole weight, its
global scale. Two layouts are in use, whose names differ, and ModelOpt stores the global scale itself where
compressed-tensors stores its reciprocal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from fp8pipe.models.checkpoint.tensors import TensorEntry, TensorHeader
from fp8pipe.numerics.nvfp4 import BLOCK
from fp8pipe.numerics.nvfp4_weights import dequantize_packed

__all__ = ["COMPRESSED_TENSORS", "LAYOUTS", "MODELOPT", "WEIGHT", "PackedEntry", "PackedLayout", "join_packed",
           "packed_headers"]  # fmt: skip

WEIGHT: Final = ".weight"


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """How a checkpoint names and stores the parts of a weight in NVFP4.

    Attributes:
        codes: suffix of the codes' name, after that of the weight.
        blocks: suffix of the block scales.
        whole: suffix of the global scale.
        inputs: suffix of the global scale of a layer's inputs, after the name of the layer.
        shape: shape of a stored global scale.
        divides: whether global scales are stored as divisors: a value is `code * scale / divisor`.
    """

    codes: str
    blocks: str
    whole: str
    inputs: str
    shape: tuple[int, ...]
    divides: bool

    def input_name(self, weight: str) -> str:
        """The name of the global scale of the inputs of the layer whose weight is called `weight`."""
        return weight.removesuffix(WEIGHT) + self.inputs

    def stored(self, scale: float) -> float:
        """The number that stands for a global scale in the files, and the global scale of such a number.

        It is exact for powers of two, whose reciprocals are powers of two.
        """
        if not self.divides:
            return scale
        return 1.0 / scale if scale else math.copysign(math.inf, scale)


COMPRESSED_TENSORS: Final = PackedLayout("_packed", "_scale", "_global_scale", ".input_global_scale", (1,), True)
MODELOPT: Final = PackedLayout("", "_scale", "_scale_2", ".input_scale", (), False)
LAYOUTS: Final[Mapping[str, PackedLayout]] = {"compressed-tensors": COMPRESSED_TENSORS, "modelopt": MODELOPT}


@dataclass(frozen=True, slots=True)
class PackedEntry(TensorEntry):
    """A weight in NVFP4; `name`, `dtype` (F32) and `shape`, `(out, in)`, are those of the tensor that `read` returns.

    Attributes:
        packed: the entry of its codes, uint8 `(out, in / 2)`.
        blocks: the entry of its block scales, E4M3 `(out, in / 16)`.
        whole: the entry of its global scale, fp32, one number.
        layout: how they are stored.
    """

    packed: TensorEntry
    blocks: TensorEntry
    whole: TensorEntry
    layout: PackedLayout

    @property
    def parts(self) -> tuple[TensorEntry, TensorEntry, TensorEntry]:
        """The stored tensors."""
        return self.packed, self.blocks, self.whole

    def read_global_scale(self) -> float:
        """The global scale: a value is `code * scale * global scale`."""
        return self.layout.stored(float(self.whole.read().reshape(-1)[0]))

    def read(self) -> Tensor:
        """The dequantized weight, a new fp32 tensor on the CPU."""
        return self.read_rows(range(self.shape[0]))

    def read_rows(self, rows: range) -> Tensor:
        """Consecutive rows of the dequantized weight, fp32; NaN where a scale is NaN."""
        return dequantize_packed(self.packed.read_rows(rows), self.blocks.read_rows(rows), self.read_global_scale())


def packed_headers(
    name: str, shape: tuple[int, ...], layout: PackedLayout = COMPRESSED_TENSORS
) -> tuple[TensorHeader, TensorHeader, TensorHeader]:
    """The tensors that store a weight `(out, in)` called `name`: codes, block scales and global scale."""
    rows, columns = shape
    return (
        TensorHeader(name + layout.codes, "U8", (rows, columns // 2)),
        TensorHeader(name + layout.blocks, "F8_E4M3", (rows, columns // BLOCK)),
        TensorHeader(name + layout.whole, "F32", layout.shape),
    )


def join_packed(entries: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """Replace the tensors of each weight in NVFP4 by one entry; those that lack a part or do not fit stay as they are.

    Args:
        entries: the tensors of a checkpoint by name, in whichever layout.
    """
    table = dict(entries)
    for name, packed in entries.items():
        for layout in LAYOUTS.values():
            weight = name.removesuffix(layout.codes)
            if not weight.endswith(WEIGHT) or weight + layout.codes != name or len(packed.shape) != 2:
                continue
            shape = (packed.shape[0], 2 * packed.shape[1])
            wanted = packed_headers(weight, shape, layout)
            found = [entries.get(header.name) for header in wanted]
            if all(
                entry is not None and (entry.dtype, entry.shape) == (header.dtype, header.shape)
                for entry, header in zip(found, wanted, strict=True)
            ):
                codes, blocks, whole = (table.pop(header.name) for header in wanted)
                table[weight] = PackedEntry(
                    weight, "F32", shape, packed.file, packed.start, codes, blocks, whole, layout
                )  # fmt: skip
    return table
