"""Dequantizes MXFP4 experts, the form in which gpt-oss is published: E2M1 codes with one scale for each 32 columns.

A stack `experts.gate_up_proj` is stored as `..._blocks`, two codes in a byte, and `..._scales`, powers of two; rows are
outputs, while a plain checkpoint holds the stack as `(experts, in, out)`. A code times its scale has at most two
significant bits, so bf16 and fp32 represent it exactly, and nothing is rounded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from fp8pipe.models.checkpoint.quantized.entries import Plain, refuse_leftover_codes
from fp8pipe.models.checkpoint.quantized.scheme import Granularity, refusal
from fp8pipe.models.checkpoint.tensors import DTYPES, TensorEntry

__all__ = ["Mxfp4Entry", "dequantized_stacks"]

_BLOCKS: Final = re.compile(r"(.+\.experts\.(?:gate_up_proj|down_proj))_blocks")
_E2M1: Final = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_BIAS: Final = 127  # of the scales' exponents; 255 means NaN
_BYTES: Final = 16  # in a block of 32 codes


@dataclass(frozen=True, slots=True)
class Mxfp4Entry(TensorEntry):
    """A stack of experts; `dtype` and `shape`, `(experts, in, out)`, are those of the tensor that `read` returns.

    Attributes:
        blocks: the entry of its codes, uint8 `(experts, out, in / 32, 16)`.
        scales: the entry of its scales, uint8 `(experts, out, in / 32)`.
    """

    blocks: TensorEntry
    scales: TensorEntry

    def read(self) -> Tensor:
        """The dequantized stack, a new tensor on the CPU."""
        return self.read_rows(range(self.shape[0]))

    def read_rows(self, rows: range) -> Tensor:
        """Consecutive experts, `(len(rows), in, out)`."""
        found = torch.empty(len(rows), *self.shape[1:], dtype=DTYPES[self.dtype])
        for place, number in enumerate(rows):  # one expert at a time, as fp32 takes twice the memory
            codes, scales = (entry.read_rows(range(number, number + 1))[0] for entry in (self.blocks, self.scales))
            found[place] = _dequantize(codes, scales).t()
        return found


def _dequantize(blocks: Tensor, scales: Tensor) -> Tensor:
    """fp32 `(out, in)`; NaN where a scale says so."""
    codes = torch.stack((blocks & 0x0F, blocks >> 4), dim=-1).flatten(-2)  # the low half of a byte comes first
    signs = 1.0 - 2.0 * (codes >> 3).float()
    exponents = scales.to(torch.int32)[..., None] - _BIAS
    values = torch.ldexp(_E2M1[(codes & 0x07).long()] * signs, exponents)
    return torch.where(scales[..., None] == 0xFF, torch.nan, values).flatten(-2)


def dequantized_stacks(root: Path, entries: Mapping[str, TensorEntry], dtype: str) -> Plain:
    """The contents of a checkpoint whose experts are in MXFP4, as floating-point tensors.

    Args:
        root: the checkpoint's directory, for messages.
        entries: all its tensors.
        dtype: of the dequantized stacks, in safetensors' spelling; `BF16` or `F32`.

    Raises:
        ConfigurationError: codes without scales, scales without codes, shapes that do not fit, or no codes at all.
    """
    if dtype not in ("BF16", "F32"):
        raise refusal(root, f"MXFP4 dequantized to {dtype} would be rounded; bf16 and fp32 hold its values")
    table = dict(entries)
    stacks = [match[1] for match in map(_BLOCKS.fullmatch, entries) if match is not None]
    if not stacks:
        raise refusal(root, "config.json declares mxfp4, and no tensor of experts ends in _blocks")
    for name in stacks:
        blocks, scales = table.pop(f"{name}_blocks"), table.pop(f"{name}_scales", None)
        if scales is None:
            raise refusal(root, f"{blocks.name} has no scales: there is no {name}_scales")
        shape = blocks.shape
        fits = len(shape) == 4 and shape[-1] == _BYTES and shape[:-1] == scales.shape
        if (blocks.dtype, scales.dtype) != ("U8", "U8") or not fits:
            why = f"{blocks.name} is {blocks.dtype} {shape} and {scales.name} {scales.dtype} {scales.shape}"
            raise refusal(root, f"{why}; expected U8 (experts, out, in / 32, {_BYTES}) and (experts, out, in / 32)")
        experts, out, count = scales.shape
        table[name] = Mxfp4Entry(name, dtype, (experts, 32 * count, out), blocks.file, blocks.start, blocks, scales)
    refuse_leftover_codes(root, (entry for entry in table.values() if not isinstance(entry, Mxfp4Entry)), "mxfp4")
    shared: Granularity = "per-block"
    return Plain(table, dict.fromkeys(stacks, shared), ())
