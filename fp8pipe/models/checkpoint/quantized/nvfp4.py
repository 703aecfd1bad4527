"""Reads a checkpoint in NVFP4 as floating-point tensors: E2M1 codes, two in a byte, with one scale for 16 inputs.

| | codes, uint8 `(out, in / 2)` | scales, E4M3 `(out, in / 16)` | global scale, fp32 |
|---|---|---|---|
| compressed-tensors | `weight_packed` | `weight_scale` | `weight_global_scale`, a divisor |
| ModelOpt | `weight` | `weight_scale` | `weight_scale_2`, a factor |

A weight is `code * (scale / divisor)` or `code * (scale * factor)`, computed in fp32 in this order, as in the libraries
that define the formats, and rounded once to the model's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import Tensor

from fp8pipe.models.checkpoint.quantized.entries import RUNTIME, Plain, refuse_leftover_codes
from fp8pipe.models.checkpoint.quantized.scheme import Granularity, Scheme, refusal
from fp8pipe.models.checkpoint.tensors import DTYPES, TensorEntry
from fp8pipe.numerics.kinds import NVFP4_BLOCK
from fp8pipe.numerics.nvfp4 import e2m1_values, unpack_nibbles

__all__ = ["Nvfp4Entry", "dequantized_nvfp4"]

_WEIGHT: Final = ".weight"
# Suffixes after the name of the weight: of codes, scales, and the global scale.
_SUFFIXES: Final = {
    "compressed-tensors": ("_packed", "_scale", "_global_scale"), "modelopt": ("", "_scale", "_scale_2"),
}  # fmt: skip
_PER_BLOCK: Final[Granularity] = "per-block"


@dataclass(frozen=True, slots=True)
class Nvfp4Entry(TensorEntry):
    """A weight in NVFP4; `dtype` and `shape`, `(out, in)`, are those of the tensor that `read` returns.

    Attributes:
        codes: the entry of its codes.
        scales: the entry of its block scales.
        whole: the entry of its global scale, one number.
        divides: whether block scales are divided by that number, not multiplied.
    """

    codes: TensorEntry
    scales: TensorEntry
    whole: TensorEntry
    divides: bool

    def read(self) -> Tensor:
        """The dequantized weight, a new tensor on the CPU."""
        return self.read_rows(range(self.shape[0]))

    def read_rows(self, rows: range) -> Tensor:
        """Consecutive rows of the dequantized weight; NaN where a scale is NaN.

        Raises:
            ConfigurationError: a block scale is negative, or the global scale is no positive number.
        """
        scales, whole = self.scales.read_rows(rows).float(), self.whole.read().float().reshape(())
        if not 0 < float(whole) < math.inf or bool((scales < 0).any()):
            wrong = self.scales.name if 0 < float(whole) < math.inf else f"{self.whole.name} ({float(whole):g})"
            raise refusal(self.file.parent, f"{self.file.name}: {wrong}: scales are positive")
        factor = scales / whole if self.divides else scales * whole
        values = e2m1_values(unpack_nibbles(self.codes.read_rows(rows))).unflatten(-1, (-1, NVFP4_BLOCK))
        weight: Tensor = (values * factor.unsqueeze(-1)).flatten(-2).to(DTYPES[self.dtype])
        return weight


def dequantized_nvfp4(root: Path, entries: Mapping[str, TensorEntry], scheme: Scheme, dtype: str) -> Plain:
    """Combine codes and scales of a checkpoint in NVFP4 into floating-point entries; no codes are read.

    Args:
        root: the checkpoint's directory, for messages.
        entries: all its tensors, as stored.
        scheme: the declared format.
        dtype: of the dequantized weights, in safetensors' spelling.

    Raises:
        ConfigurationError: codes without scales, scales without codes, shapes that do not fit, or no codes at all.
    """
    suffixes = _SUFFIXES[scheme.method]
    table, weights = dict(entries), list(_weights(entries, suffixes[0]))
    if not weights:
        raise refusal(root, f"config.json declares NVFP4 of {scheme.method}, but no tensor holds such codes")
    for weight in weights:
        names = [weight + suffix for suffix in suffixes]
        if missing := [name for name in names if name not in table]:
            raise refusal(root, f"{names[0]} has no {' and no '.join(missing)}")
        codes, scales, whole = (table.pop(name) for name in names)
        rows, columns = codes.shape[0], 2 * codes.shape[1]
        said = [(one.dtype, one.shape) for one in (scales, whole)]
        if columns % NVFP4_BLOCK or said[0] != ("F8_E4M3", (rows, columns // NVFP4_BLOCK)):
            wanted = f"F8_E4M3 ({rows}, {columns / NVFP4_BLOCK:g})"
            raise refusal(root, f"{scales.name} is {scales.dtype} {scales.shape}; expected {wanted}")
        if said[1] not in (("F32", ()), ("F32", (1,))):
            raise refusal(root, f"{whole.name} is {whole.dtype} {whole.shape}; expected one number in F32")
        divides = scheme.method == "compressed-tensors"
        table[weight] = Nvfp4Entry(
            weight, dtype, (rows, columns), codes.file, codes.start, codes, scales, whole, divides
        )  # fmt: skip
    runtime = tuple(name for name in table if name.endswith(RUNTIME))
    table = {name: entry for name, entry in table.items() if name not in runtime}
    ends = tuple(_WEIGHT + suffix for pair in _SUFFIXES.values() for suffix in pair if suffix)
    if alone := [name for name in table if name.endswith(ends)]:
        raise refusal(root, f"{len(alone)} tensor(s) belong to no weight in NVFP4, the first: {alone[0]}")
    refuse_leftover_codes(
        root, (entry for entry in table.values() if not isinstance(entry, Nvfp4Entry)), f"NVFP4 of {scheme.method}"
    )
    return Plain(table, dict.fromkeys(weights, _PER_BLOCK), runtime)


def _weights(entries: Mapping[str, TensorEntry], suffix: str) -> Iterator[str]:
    """Names of the weights that codes belong to."""
    for name, entry in entries.items():
        if name.endswith(_WEIGHT + suffix) and entry.dtype == "U8" and len(entry.shape) == 2:
            yield name.removesuffix(suffix)
