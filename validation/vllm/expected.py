"""What the engine ought to hold: every tensor of an export in fp32, with digests, one tensor in memory at a time.

The values come from the export itself, or, where the artifact it was made from is given, from that artifact: then
a code that changed on the way is found even if the export's manifest was rewritten to agree with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exporters.vllm.source import Source, open_source
from exporters.vllm.target import VllmDetails
from fp8pipe.artifact import Artifact
from fp8pipe.core.errors import ConfigurationError
from fp8pipe.models.checkpoint.tensors import SCALE_SUFFIX, TensorEntry, is_scale, read_tensor, weight_entries
from fp8pipe.numerics.grids import E4M3, dequantize_weight, to_bf16


@dataclass(frozen=True, slots=True)
class Expected:
    """One tensor.

    Attributes:
        name: checkpoint name.
        value: fp32, orientation stored.
        codes: float8_e4m3fn codes of the same shape, None for unquantized tensors.
        scale: fp32, dequantized = code * scale, broadcastable to `codes`; None with them.
        transposed: stored `(in, out)`; the engine holds it the other way round.
    """

    name: str
    value: Tensor
    codes: Tensor | None
    scale: Tensor | None
    transposed: bool

    def digests(self) -> dict[str, Any]:
        """Shape and sha256 of the fp32 bytes, and of the same bytes with each -0 written as +0."""
        value = self.value.contiguous()
        return {
            "shape": list(value.shape),
            "transposed": self.transposed,
            "sha256": hashlib.sha256(value.numpy().data).hexdigest(),
            "sha256_unsigned_zero": hashlib.sha256((value + 0.0).numpy().data).hexdigest(),
        }


class ExpectedWeights:
    """The tensors an export stands for.

    Args:
        export: the opened export.
        against: the falqon artifact it was made from, or None to take the export's own word.

    Raises:
        ConfigurationError: `against` is not the artifact that the export's manifest names.
        BadArtifactError: either is damaged.
    """

    def __init__(self, export: Artifact, against: Path | None = None) -> None:
        self.export = export
        self.entries = weight_entries(export.root)
        self.transposed = set(export.manifest.details_of(VllmDetails).transposed)
        self.source = None if against is None else _parent_source(export, against)
        self.names = [name for name in self.entries if not is_scale(name, self.entries)]

    @property
    def reference(self) -> str:
        """`source` when values come from the artifact exported, else `export`."""
        return "export" if self.source is None else "source"

    def quantized(self, name: str) -> bool:
        """Whether the export stores the tensor as codes."""
        return name + SCALE_SUFFIX in self.entries

    def __iter__(self) -> Iterator[Expected]:
        return (self.read(name) for name in self.names)

    def read(self, name: str) -> Expected:
        """One tensor by name; its codes and scale come from where its value comes from."""
        source = self.source
        if source is None or not self._comparable(name, source):
            return _read(self.entries, name, name in self.transposed)
        expected = _read(source.tensors, name, name in self.transposed)
        if expected.codes is None or self.quantized(name):
            return expected
        return Expected(name, to_bf16(expected.value).float(), None, None, expected.transposed)

    def _comparable(self, name: str, source: Source) -> bool:
        """A tensor that the export itself quantized has no codes in the source to be compared with."""
        in_codes = name + SCALE_SUFFIX in source.tensors
        return name in source.tensors and (in_codes or not self.quantized(name))


def count_differences(expected: Expected, actual: Tensor) -> tuple[int, int]:
    """Elements whose bits differ, and elements that quantize to another code under the artifact's scale.

    Args:
        expected: the tensor as it should be.
        actual: fp32, what the engine holds.

    Returns:
        both counts; every element for a tensor of another shape, and no codes for an unquantized one.
    """
    total = expected.value.numel()
    if actual.shape != expected.value.shape:
        return total, total if expected.codes is not None else 0
    bits = int((actual.view(torch.int32) != expected.value.contiguous().view(torch.int32)).sum())
    if expected.codes is None or expected.scale is None:
        return bits, 0
    codes = E4M3.cast(actual / expected.scale)
    return bits, int((codes.view(torch.uint8) != expected.codes.contiguous().view(torch.uint8)).sum())


def _read(entries: dict[str, TensorEntry], name: str, transposed: bool) -> Expected:
    tensor = read_tensor(entries[name])
    if name + SCALE_SUFFIX not in entries:
        return Expected(name, tensor.float(), None, None, transposed)
    scale = read_tensor(entries[name + SCALE_SUFFIX])
    value = dequantize_weight(tensor, scale, transposed=transposed)
    across = scale.reshape(1, -1) if transposed and scale.ndim == 2 else scale
    return Expected(name, value, tensor, across, transposed)


def _parent_source(export: Artifact, against: Path) -> Source:
    source = open_source(against)
    digests = {parent.digest for parent in export.manifest.parents}
    if source.parent.digest not in digests:
        raise ConfigurationError(
            f"{export.root} was not made from {against}",
            why=f"its manifest names {', '.join(sorted(digests)) or 'no parent'}; that is {source.parent.digest}",
            fix="name the artifact that was exported, or leave it out",
        )
    return source
